"""The API in a few lines: `python examples/quickstart.py BUNDLE PHOTO`."""

import sys

import numpy as np

from tokenflow_sdk import Codes, Tokenizer

bundle, photo = sys.argv[1:3]

with Tokenizer.from_pretrained(bundle) as tok:
    codes = tok.encode(photo)  # a path, bytes, file object, PIL image or u8 array
    print(codes)

    codes.save("photo.tfc")  # 1 to 2 KB for 256 px
    assert Codes.load("photo.tfc") == codes

    tok.decode(codes).save("out.png")  # a PIL image
    tok.decode(codes.truncate(4)).save("preview.png")  # the four coarsest scales: a preview

    print(tok.features(codes).shape)  # what a language model's projector reads
    print(tok.semantic(codes).shape)  # teacher-like features, for search and classification

    pictures = np.stack([tok.preprocess(photo)] * 2)  # u8 [B, H, W, 3]
    indices = tok.encode_array(pictures)  # int32 [B, L]
    print(indices.shape, tok.decode_array(indices).shape)
