"""check_picture.py FILE: fails unless FILE is a picture to look at: a PNG in RGB, 64 pixels wide or more, not flat."""

import sys

from PIL import Image

with Image.open(sys.argv[1]) as picture:
    picture.load()
    assert picture.format == "PNG", picture.format
    assert picture.mode == "RGB", picture.mode
    assert min(picture.size) >= 64, picture.size
    assert max(high - low for low, high in picture.getextrema()) > 64, "the picture is flat"
print(f"{sys.argv[1]}: {picture.size[0]} x {picture.size[1]}")
