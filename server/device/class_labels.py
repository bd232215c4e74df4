"""The name of each class of a model: its own, else ImageNet's, else numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from server.errors import SettingsError, shown

_LONGEST = 1000


def class_labels(names: object, descriptions: object, num_classes: int) -> tuple[str, ...]:
    """The name of each class, in class order.

    Args:
        names: `label_names` of a model's configuration: a list of names in class order, a mapping of class numbers to
            names, or a mapping of names to class numbers. If None, the number of classes tells whether they are
            ImageNet's.
        descriptions: `label_descriptions`: a mapping of names to displayed texts, or a list in class order.
        num_classes: Number of classes; 0 without a classifier.

    Raises:
        SettingsError: A class has no name, or a name is not text.
    """
    if not num_classes:
        return ()
    if names is None:
        subset = infer_imagenet_subset({"num_classes": num_classes})
        if subset:
            return tuple(ImageNetInfo(subset).label_descriptions())
        return tuple(f"class {index}" for index in range(num_classes))
    ordered = _texts(_in_order(names, num_classes), "label_names")
    if descriptions is None:
        return ordered
    if isinstance(descriptions, Mapping):
        return _texts([descriptions.get(name, name) for name in ordered], "label_descriptions")
    return _texts(_in_order(descriptions, num_classes, "label_descriptions"), "label_descriptions")


def _in_order(values: object, num_classes: int, field: str = "label_names") -> Sequence[object]:
    """Values in class order, from a list or a mapping from or to class numbers."""
    if isinstance(values, Mapping):
        by_class = _by_class(values, field)
        missing = next((index for index in range(num_classes) if index not in by_class), None)
        if missing is not None:
            raise SettingsError(f"{field} has no class {missing}; the model has the classes 0 to {num_classes - 1}")
        values = [by_class[index] for index in sorted(by_class)]
    if not isinstance(values, list | tuple):
        raise SettingsError(
            f"{field} is {shown(values)}; it must be a list of text, or a mapping of class numbers to text"
        )
    if len(values) != num_classes:
        raise SettingsError(f"{field} lists {len(values)} classes; the model has {num_classes}")
    return values


def _by_class(values: Mapping[object, object], field: str) -> Mapping[int, object]:
    if all(_is_index(key) for key in values):
        return {int(str(key)): value for key, value in values.items()}
    if all(type(value) is int and value >= 0 for value in values.values()):
        by_class = {int(str(value)): key for key, value in values.items()}
        if len(by_class) == len(values):
            return by_class
        raise SettingsError(f"{field} gives two names the same class")
    odd = next(key for key in values if not _is_index(key))
    raise SettingsError(f"{field} has the key {shown(odd)}; the keys of a mapping must be class numbers")


def _is_index(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key


def _texts(values: Sequence[object], field: str) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if not isinstance(value, str) or not 1 <= len(value) <= _LONGEST or not _can_be_sent(value):
            raise SettingsError(
                f"{field} has {shown(value)} for class {index}; it must be text of 1 to {_LONGEST} characters"
            )
    return tuple(str(value) for value in values)


def _can_be_sent(text: str) -> bool:
    """Whether it is valid Unicode: JSON can hold a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
