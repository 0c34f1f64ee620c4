class Statistics:
    """Counts of one document; in characters unless the name says lines, words, paragraphs or urls."""

    characters: int
    letters: int
    digits: int
    spaces: int
    newlines: int
    replacements: int
    hashes: int
    ellipses: int
    words: int
    alphabetic_words: int
    longest_word: int
    longest_space: int
    schemes: int
    urls: int
    url_characters: int
    lines: int
    line_characters: int
    repeated_lines: int
    repeated_line_characters: int
    paragraphs: int
    repeated_paragraphs: int
    repeated_paragraph_characters: int
    short_lines: int
    bullet_lines: int
    ellipsis_lines: int
    ended_lines: int
    mend: int

def scan(text: str | bytes) -> Statistics:
    """What the rules judge a document by, in one pass. TypeError, UnicodeDecodeError."""

def repetition(text: str | bytes, top: list[int], duplicate: list[int]) -> tuple[int, list[int], list[int]]:
    """(characters of all words, those of the n-gram that covers most, those in n-grams seen before), for each n."""

class FunctionWords:
    """The function words of up to 64 languages."""

    def __init__(self, words: list[list[str]]) -> None: ...
    def hints(self, text: str | bytes) -> tuple[list[int], int, list[int], list[int]]:
        """(letters of each script [14], words, function words of each language, different ones among these).

        Of the first 65,536 characters. No word counts more often than once in 32 words.
        """

class Leaks:
    """n-grams of up to 64 evaluation sets. All texts in lower case."""

    def __init__(self, n: int, shortest: int) -> None: ...
    def add(self, text: str | bytes, set: int) -> int:
        """One item of set 0 … 63; returns its words. Below ``n`` words it counts as a whole, below ``shortest`` not."""

    def finish(self) -> int:
        """Ends the adding; returns the number of n-grams."""

    def find(self, text: str | bytes) -> list[tuple[int, int, int]]:
        """(set, first character, end) of the first leak from each set."""
