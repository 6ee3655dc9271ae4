"""The terms of the pages: an explanation where the pointer rests, and a list of those that were used at the end.

The list is for everybody who has no pointer: on a telephone, by the keyboard, on paper.
"""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup, escape

#: what `core.tensors.Action` says of a layer or tensor
ACTIONS = {
    "copy": "The stored bytes of one source, unchanged.",
    "derive": "What one source computes when it is read: with an adapter applied, rows of another tokenizer, or the"
    " result of a document of the recipe.",
    "cast": "One source's values in another dtype.",
    "zeros": "Zeros: a new layer whose outputs are zero adds nothing until it is trained.",
    "align": "One source's values in the order of another source.",
    "compute": "Values that the merge method computed, or that a calibration set.",
}
CHECKS = {
    "manifest": "deus_merge.json is there, and as it was written.",
    "other files": "Config, tokenizer and the other small files have the checksums that the manifest names.",
    "files and headers": "The weight files are those that were written, without holes and overlaps.",
    "tensors against the plan": "Each tensor has the name, dtype and shape that was planned.",
    "layers and config": "config.json names as many layers as there are, and says the same of each as was planned.",
    "checksums": "Each tensor has the checksum that was computed when it was written.",
    "zeroed tensors": "Tensors that were to be zero are zero.",
    "copied tensors": "Tensors that were copied equal their sources byte for byte.",
    "finite values": "No tensor holds NaN or infinity.",
    "tokenizer": "The tokenizer loads, and each of its tokens has a row in the embeddings.",
    "transformers": "transformers builds the model and finds every tensor.",
    "layer kinds": "Each layer is of the kind of the layer that it comes from.",
    "logits": "The outputs of base and result on a text are compared.",
}
TERMS = ACTIONS | {
    "new layers": "Layers that were added. They are trained; all others stay as they are.",
    "tensors to train": "The tensors of the new layers: new_parameters in deus_merge.json has their names.",
    "parameters": "The number of weights, as deus-merge plan and inspect count them.",
    "to train": "Parameters of the new layers.",
    "plan": "What was to be done, computed from the recipe and the headers of the models before a tensor was read."
    " The same recipe and models have the same number here.",
    "contents": "sha256 of a source's config, headers and samples of weights: whether it is the one that was used.",
    "base": "The model whose config, tokenizer, embeddings and head the output has.",
    "computes what the base computes": "New layers add zero, so the output's results are the base's until it is"
    " trained.",
    "does not compute what the base computes": "New layers change the result: expect a higher loss than the base's"
    " until it is trained.",
    "calibrated": "Outputs of new layers were set from a text, so the output's results differ from the base's.",
    "trained after the run": "Trained since it was written: only frozen tensors can be compared with the sources.",
    "A and B": "Two layers of which A is brought into the order of B. Where a new layer lies between two others, A is"
    " the lower one and B the upper one.",
    "cosine": "How alike two vectors are: 1 is the same direction, 0 nothing in common. The first number is that of"
    " rows, neurons, heads or experts that have the same number in A and B, before the alignment; the second that of"
    " matched ones.",
    "heads: values": "Cosine of what the value paths of two attention heads compute.",
    "heads: queries and keys": "Cosine of what the query-key paths of two attention heads compute.",
    "transport cost": "The mean distance between matched rows, in the units of the chosen cost: lower is more alike.",
    "effective support": "How many rows of A contribute to a row of B: 1 is a permutation, more is a mixture.",
    "marginal error": "How far the transport plan is from using each row once: the L1 distance of its sums from those"
    " that are wanted.",
    "iterations": "Passes of the solver; 0 for exact solvers that do not count them.",
    "time of the solver": "Wall time of the transport plan.",
    "mean over experts": "Columns of experts.* are means over all experts of the layer; of marginal error and"
    " iterations the largest, of times the sum.",
    "read": "Tensors that were read onto the device, dequantised or adapted, and bytes that came from other machines.",
    "computed": "The arithmetic: alignment, fusion, merging, casts.",
    "wrote": "Tensors that were written, and copies from file to file.",
    "waited": "For what another thread reads or writes, for pages of files that are read as they are needed, and for a"
    " processor that other programs use.",
    "closed form": "A regression on the gradient, without training steps.",
    "damping": "What was added to the diagonal of the regression, relative to its mean.",
    "nats a token": "The loss: minus the natural logarithm of the probability of the next token, on average.",
    "held-out tokens": "Tokens that were not fitted: the step that gives them the lowest loss was taken.",
    "step": "The factor on the closed form; 0 where no step lowered the loss.",
    "init": "How the new layers began: a preset or a recipe.",
    "places": "Where the new layers are.",
    "optimizer": "What trained them.",
    "lr": "The best learning rate; in brackets if it is the lowest or highest that was tried: a better one may lie"
    " beyond.",
    "seeds": "The number of runs with that learning rate: other windows of the text in another order.",
    "first loss": "Held-out loss before training, in nats a token, mean over seeds.",
    "last loss": "Held-out loss after training, in nats a token, mean over seeds.",
    "difference": "Of the last loss to that of the first row, seed by seed, with its 95 % interval.",
    "tokens": "Tokens needed to reach the last loss of the first row, over those that it needed.",
    "at equal FLOPs": "The difference where both have computed as much as the cheaper one does in all, without"
    " calibration.",
    "base's text": "The change of the loss on the other text: what was forgotten.",
    "trained": "The number of parameters that were trained.",
    "memory": "Weights, gradients, optimizer states, and what the backward pass keeps.",
    "TFLOP": "Floating point operations of the training, in units of 10¹².",
    "s": "Seconds of a run, mean over seeds.",
}  # fmt: skip


class Glossary:
    """Explains the terms of one page, and knows which were used.

    Attributes:
        used: Term -> explanation, in the order of their first use.
    """

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def term(self, name: str, text: str | None = None, terms: Mapping[str, str] = TERMS) -> Markup:
        """A term with its explanation; a name without one stays as it is.

        Args:
            name: The term.
            text: What the page shows for it; by default the term.
            terms: Where its explanation is.
        """
        shown = escape(name if text is None else text)
        if name not in terms:
            return shown
        self.used[name] = terms[name]
        return Markup('<abbr title="{}">{}</abbr>').format(terms[name], shown)

    def check(self, name: str) -> Markup:
        """The name of a check with its explanation."""
        return self.term(name, terms=CHECKS)
