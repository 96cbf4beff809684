"""Which use of chance a generator is for: two uses never share their draws."""

from enum import IntEnum


class Stream(IntEnum):
    """For `keyed_generator`, beside the library's own below 10."""

    REFERENCE = 10  # fresh data that samples are held against
    NOISE = 11  # the noises that judged samples start from
    SEARCH_NOISE = 12  # those on which scales are chosen
    FEW = 13  # the points of a small data set
    FLOOR = 14  # data that are held against data
    PAIRS = 15  # the noises of Reflow's pairs
    RENOISE = 16  # the fresh noise of consistency sampling
    DRAWINGS = 20  # captioned drawings that are trained on
    FLUX_PAIRS = 22
    FLUX_RENOISE = 23
    OTHER_DATA = 30  # fresh data that a coverage is calibrated on
    SUBSET = 31  # which images a small data set holds
