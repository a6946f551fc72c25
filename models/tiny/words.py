"""Every word the tiny model knows, and the question templates it was trained on."""

EASY_COLOURS = {
    "red": (220, 40, 40), "orange": (240, 140, 30), "yellow": (240, 230, 60), "green": (40, 170, 60),
    "blue": (50, 90, 230), "purple": (150, 60, 200), "white": (245, 245, 245), "pink": (250, 150, 190),
}  # fmt: skip
STRESS_COLOURS = EASY_COLOURS | {
    "cyan": (60, 210, 220), "brown": (130, 80, 40), "lime": (150, 235, 60), "navy": (25, 35, 130),
    "maroon": (130, 20, 40), "teal": (20, 130, 130), "gold": (205, 165, 30), "black": (10, 10, 10),
}  # fmt: skip
EASY_SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart"]
STRESS_SHAPES = [*EASY_SHAPES, "hexagon", "arrow", "moon", "bar"]
DIGITS = list("0123456789")
DRAWN_WORDS = ["cat", "dog", "sun", "map", "key", "box", "ice", "pen"]
NAMES = STRESS_SHAPES + DIGITS + DRAWN_WORDS
ROWS = ["top", "middle", "bottom"]
COLUMNS = ["left", "centre", "right"]
MOVES = ["still", "leftward", "rightward", "upward", "downward"]
SIZES = ["small", "large"]
COUNTS = list("123456789")

SPECIAL = [
    "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# task -> templates. {c} colour, {n} name (a shape, "digit 7", "word cat"), {s} size; {c2} {n2} a second object.
EASY_FORMS = {
    "colour": ["what colour is the {n}?"],
    "shape": ["what shape is the {c} object?"],
    "where": ["where is the {n}?", "where is the {c} object?"],
    "first": ["which colour appears first?", "which shape appears first?"],
    "last": ["which colour appears last?", "which shape appears last?"],
    "count": ["how many objects are there?"],
    "exist": ["is there a {c} object?", "is there a {n}?"],
    "moves": ["does the {n} move?", "does the {c} object move?"],
    "way": ["which way does the {n} move?", "which way does the {c} object move?"],
    "after": ["which shape appears right after the {n}?", "which colour appears right after the {c} object?"],
    "before": ["which shape appears right before the {n}?", "which colour appears right before the {c} object?"],
}
STRESS_FORMS = {
    "colour": ["what colour is the {n}?", "what colour is the {s} {n}?"],
    "shape": ["what shape is the {c} object?"],
    "read": ["which digit is {c}?", "which word is {c}?"],
    "where": ["where is the {c} {n}?"],
    "first": ["which colour appears first?"],
    "last": ["which colour appears last?"],
    "count": ["how many objects are there?", "how many objects are {c}?"],
    "exist": ["is there a {c} {n}?"],
    "size": ["what size is the {c} {n}?"],
    "way": ["which way does the {c} {n} move?"],
    "after": ["what appears right after the {c} {n}?"],
    "before": ["what appears right before the {c} {n}?"],
    "order": ["does the {c} {n} appear before the {c2} {n2}?"],
}


def vocabulary() -> list[str]:
    """All tokens, in id order: special tokens, then every word of the templates, names and answers."""
    words = ["user", "assistant", "system", "?", ".", ",", "yes", "no", "digit", "word", "none", "an"]
    words += [*STRESS_COLOURS, *NAMES, *ROWS, *COLUMNS, *MOVES, *SIZES, *COUNTS]
    for forms in (EASY_FORMS, STRESS_FORMS):
        for form in sum(forms.values(), []):
            words += [w for w in form.replace("?", " ").split() if "{" not in w]
    return list(dict.fromkeys(SPECIAL + words))
