"""A text for calibrations of the tiny model."""

#: prose that the tiny model has not seen, as different from its own text as English is
SENTENCES = (
    "the ship left its harbour before dawn and sailed along a cold coast where small white houses stood between dark"
    " rocks; an old captain counted gulls while his crew mended nets, cooked fish soup and talked about weather, money"
    " and home. when rain came they sang quietly below deck until morning light returned over calm grey water."
)
WORDS = SENTENCES.split()
PROSE = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(4000))
