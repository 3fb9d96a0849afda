"""The loop over scales on graphs that are plain functions: what each is fed, what is stored, and what comes of the codes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.fake_graphs import GENERATOR, FakeGraph, tensor, transformer_graph
from tokenflow_sdk.backends.session import Array
from tokenflow_sdk.errors import NotFiniteError, PagesExhausted
from tokenflow_sdk.generation.scale_loop import ImageState, Prefix, ScaleLoop
from tokenflow_sdk.model.sampling import TIES, Pass, SamplingParams, uniform
from tokenflow_sdk.model.transformer import PagedTransformer

CONFIG = replace(GENERATOR, patch_nums=(1, 2, 3, 4))
"""Scales begin at 0, 1, 5 and 14; image positions at 8."""
RNG = np.random.default_rng(0)
CODEBOOK = RNG.standard_normal((CONFIG.codebook_size, 3)).astype(np.float32)
ONE = SamplingParams((Pass(4, 0.5),), cfg_scale=6.0, seed=3)
THREE = SamplingParams((Pass(900, 0.75), Pass(20, 0.25), Pass(1, 0.0)), cfg_scale=3.0, seed=4)


def embed_text(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"embeddings": np.stack([feeds["token_ids"].astype(np.float32), feeds["starts"]], axis=-1)}


def embed_image(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """The first feature, and where the token stands."""
    x = feeds["features"]
    places = np.broadcast_to(feeds["places"] + 1000 * feeds["level"], x.shape[:2])
    return {"embeddings": np.stack([x[..., 0], places.astype(np.float32)], axis=-1)}


def transform(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Hidden states are the inputs; keys are positions and values numbers of the call's inputs."""
    stored = [feeds["positions"].astype(np.float32), feeds["embeddings"][..., 1]]
    k, v = (array[None, :, :, None, None] for array in stored)
    return {"hidden": feeds["embeddings"], "new_k": k, "new_v": v}


def sample(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Any function that depends on everything that is one row's own."""
    hidden = feeds["conditional"].astype(np.float64) + 2 * feeds["unconditional"]
    mixed = hidden[..., 0] + 100 * feeds["noise"]
    mixed = mixed + feeds["guidance"][:, None] + feeds["top_k"][:, None] + 10 * feeds["top_p"][:, None]
    certain = np.isfinite(mixed).all(axis=-1)
    codes = np.floor(np.where(certain[:, None], mixed, 0) * 7).astype(np.int32) % CONFIG.codebook_size
    logits = np.where(certain[:, None, None], np.eye(CONFIG.codebook_size, dtype=np.float32)[codes], np.float32(np.nan))
    return {"code_indices": codes, "certain": certain.astype(np.int32), "logits": logits}


class Graphs(dict[str, FakeGraph]):
    def __init__(self, most: int | None = None) -> None:
        embeddings = [tensor("embeddings", "float32", "batch", "queries", 2)]
        text = [tensor("token_ids", "int32", "batch", "queries"), tensor("starts", "float32", "batch", "queries")]
        image = [
            tensor("features", "float32", "batch", "queries", 3),
            tensor("level", "int32", 1),
            tensor("places", "int32", "queries"),
        ]
        drawing = [
            *(tensor(name, "float32", "batch", "queries", 2) for name in ("conditional", "unconditional")),
            *(tensor(name, "float32", "batch") for name in ("guidance", "top_p")),
            tensor("top_k", "int32", "batch"),
            tensor("noise", "float32", "batch", "queries"),
            tensor("ranks", "int32", "window"),
        ]
        sampled = [
            tensor("code_indices", "int32", "batch", "queries"),
            tensor("certain", "int32", "batch"),
            tensor("logits", "float32", "batch", "queries", CONFIG.codebook_size),
        ]
        sizes = {} if most is None else {"batch": most}
        super().__init__(
            embed_text=FakeGraph(text, embeddings, embed_text),
            embed_image=FakeGraph(image, embeddings, embed_image),
            transformer=transformer_graph(CONFIG, transform, sizes),
            sample=FakeGraph(drawing, sampled, sample),
        )


def make(pages: int = 60, page_size: int = 4, most: int | None = None) -> tuple[ScaleLoop, Graphs]:
    graphs = Graphs(most)
    transformer = PagedTransformer.of(CONFIG, graphs["transformer"], pages, page_size)
    return ScaleLoop(CONFIG, graphs, transformer, CODEBOOK), graphs


def begin(loop: ScaleLoop, params: SamplingParams, number: int = 0, prompt: Sequence[int] = (2, 3)) -> ImageState:
    conditional, unconditional = loop.prefill(prompt), loop.prefill([4])
    image = loop.start(params, number, conditional, unconditional)
    conditional.table.release()
    unconditional.table.release()
    return image


def sample_scale(loop: ScaleLoop, *images: ImageState) -> None:
    """All passes of the next scale, of as many images together as the transformer takes."""
    scale, most = images[0].scale, min(len(images), loop.transformer.max_rows // 2)
    for start in range(0, len(images), most):
        while active := [image for image in images[start : start + most] if image.scale == scale and image.error is None]:
            loop.sample_pass(active)


def run(loop: ScaleLoop, *images: ImageState) -> None:
    while images[0].scale < len(CONFIG.patch_nums):
        sample_scale(loop, *images)


def stored(loop: ScaleLoop, prefix: Prefix) -> list[int]:
    """The keys in a row's pages: positions."""
    pages = np.asarray(loop.transformer._k.slots)[prefix.table.pages]
    return pages.reshape(-1)[: prefix.table.length].astype(int).tolist()


@pytest.mark.parametrize(
    ("prompt", "rows", "positions"),
    [
        ((), [1, 20], [7, 8]),
        # Ids behind the codes are rows behind the text; the image start is one of them.
        ((5, 73, 6), [1, 5, 23, 6, 20], [4, 5, 6, 7, 8]),
        # BOS and seven ids are all that is read.
        (tuple(range(2, 12)), [1, 2, 3, 4, 5, 6, 7, 8, 20], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_prompt_ends_where_the_image_begins(prompt: tuple[int, ...], rows: list[int], positions: list[int]) -> None:
    loop, graphs = make()
    prefix = loop.prefill(prompt)
    (text,), (step,) = graphs["embed_text"].feeds, graphs["transformer"].feeds
    assert text["token_ids"].tolist() == [rows]
    assert text["starts"].tolist() == [[0.0] * (len(rows) - 1) + [1.0]]
    assert step["positions"].tolist() == [positions]
    assert step["visible"].tolist() == [list(range(1, len(rows) + 1))]
    assert step["context"].tolist() == [0]
    assert step["block_tables"].shape == (1, 1)
    assert prefix.table.length == len(rows)
    assert prefix.hidden.tolist() == [20.0, 1.0]
    assert stored(loop, prefix) == positions


def test_several_ids_may_begin_an_image() -> None:
    loop, graphs = make()
    loop.config = replace(CONFIG, image_start_ids=(70, 71))
    loop.prefill([5])
    assert graphs["embed_text"].feeds[0]["token_ids"].tolist() == [[1, 5, 20, 21]]
    assert graphs["embed_text"].feeds[0]["starts"].tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert graphs["transformer"].feeds[0]["positions"].tolist() == [[6, 7, 8, 9]]


def test_the_first_scale_is_drawn_from_the_prompts_alone() -> None:
    loop, graphs = make()
    image = begin(loop, THREE)
    graphs["transformer"].feeds.clear()
    sample_scale(loop, image)
    assert graphs["transformer"].feeds == graphs["embed_image"].feeds == []
    (drawing,) = graphs["sample"].feeds
    # The one row goes twice, as in a batch.
    assert drawing["conditional"].tolist() == [[image.conditional.hidden.tolist()]] * 2
    assert drawing["unconditional"].tolist() == [[image.unconditional.hidden.tolist()]] * 2
    assert [row.shape for row in image.codes] == [(1,)]


def test_what_every_scale_is_fed() -> None:
    loop, graphs = make()
    image = begin(loop, ONE, prompt=(2, 3))
    graphs["transformer"].feeds.clear()
    run(loop, image)
    assert [feeds["level"].tolist() for feeds in graphs["embed_image"].feeds] == [[2], [3], [4]]
    assert [feeds["places"].tolist() for feeds in graphs["embed_image"].feeds] == [
        list(range(1, 5)),
        list(range(5, 14)),
        list(range(14, 30)),
    ]
    for feeds, (count, start, context, width) in zip(
        graphs["transformer"].feeds,
        # The prompts have 4 and 3 tokens; each scale finds those before it stored. Pages hold 4 tokens.
        [(4, 1, (4, 3), 3), (9, 5, (8, 7), 4), (16, 14, (17, 16), 6)],
        strict=True,
    ):
        assert feeds["positions"].tolist() == [[8 + start + i for i in range(count)]] * 2
        assert feeds["visible"].tolist() == [[count] * count] * 2
        assert feeds["context"].tolist() == list(context)
        assert feeds["block_tables"].shape == (2, width)


def test_what_a_row_reads_does_not_depend_on_its_company() -> None:
    """The width of block tables is that of the longest prompt, whoever is there."""
    widths = set()
    for prompts in (((),), ((), (2, 3, 4, 5, 6, 7))):
        loop, graphs = make()
        images = [begin(loop, ONE, prompt=prompt) for prompt in prompts]
        graphs["transformer"].feeds.clear()
        run(loop, *images)
        widths.add(tuple(feeds["block_tables"].shape[1] for feeds in graphs["transformer"].feeds))
    assert len(widths) == 1


def test_what_drawing_is_fed() -> None:
    loop, graphs = make()
    images = [begin(loop, ONE, 0), begin(loop, THREE, 1)]
    run(loop, *images)
    found = [
        {name: feeds[name].tolist() for name in ("guidance", "top_k", "top_p")} | {"window": len(feeds["ranks"])}
        for feeds in graphs["sample"].feeds
    ]
    # Guidance grows to its scale; top_k never exceeds the codebook; later passes are of the second image alone.
    first = {"top_k": [4, 50], "top_p": [0.5, 0.75], "window": 50}
    second = {"top_k": [20], "top_p": [0.25], "window": 20 + TIES}
    third = {"top_k": [1], "top_p": [0.0], "window": 1 + TIES}
    expected = [{"guidance": [0.0, 0.0]} | first]
    for scale in (1, 2, 3):
        expected += [{"guidance": [2.0 * scale, 1.0 * scale]} | first]
        expected += [{"guidance": [1.0 * scale]} | later for later in (second, third)]
    assert found == expected
    for feeds in graphs["sample"].feeds:
        assert feeds["ranks"].tolist() == list(range(len(feeds["ranks"])))
    counts = [(0, 0, 1)] + [(scale, refinement, (scale + 1) ** 2) for scale in (1, 2, 3) for refinement in range(3)]
    for feeds, (scale, refinement, count) in zip(graphs["sample"].feeds, counts, strict=True):
        rows = [uniform(4, 1, scale, refinement, count)]
        if refinement == 0:
            rows.insert(0, uniform(3, 0, scale, 0, count))
        np.testing.assert_array_equal(feeds["noise"], rows)


def test_refinement_and_the_last_scale_store_nothing() -> None:
    loop, graphs = make()
    image = begin(loop, THREE)
    kept = [*range(5, 9)], [*range(6, 9)]
    lengths = [4, 8, 17, 17]
    for scale, length in enumerate(lengths):
        sample_scale(loop, image)
        assert [image.conditional.table.length, image.unconditional.table.length] == [length, length - 1]
        for prefix, prompt in zip((image.conditional, image.unconditional), kept, strict=True):
            # Positions of all scales but the first, whose token was the prompt's last, and the last one.
            assert stored(loop, prefix) == [*prompt, *range(9, 9 + length - 4)], scale
    # All passes of a scale see the same context.
    contexts = [feeds["context"].tolist() for feeds in graphs["transformer"].feeds[2:]]
    assert contexts == [[4, 3]] * 3 + [[8, 7]] * 3 + [[17, 16]] * 3


def plain(params: SamplingParams, number: int, prompt: Sequence[int]) -> tuple[list[list[int]], list[np.ndarray]]:
    """One image by itself: its codes, and the maps that each pass reads. Resized by torch."""
    codes: list[list[int]] = []
    maps: list[np.ndarray] = []
    f_hat = torch.zeros(1, 3, 1, 1)
    ends = [(float(20), 1.0)] * 2
    for scale, side in enumerate(CONFIG.patch_nums):
        count, row = side * side, np.zeros(0, int)
        for refinement, step in enumerate(params.passes if scale else params.passes[:1]):
            hidden = np.asarray(ends)[:, None]
            if scale:
                x = f_hat[0].numpy() + (0 if refinement == 0 else CODEBOOK[row].T.reshape(3, side, side))
                maps.append(x)
                place = np.arange(CONFIG.scales.starts[scale], CONFIG.scales.ends[scale]) + 1000.0 * (scale + 1)
                hidden = np.stack([np.stack([x[0].reshape(-1), place], axis=-1)] * 2)
            feeds = {
                "conditional": hidden[:1].astype(np.float32),
                "unconditional": hidden[1:].astype(np.float32),
                "noise": uniform(params.seed, number, scale, refinement, count)[None],
                "guidance": np.float32([params.cfg_scale * scale / 3]),
                "top_k": np.int32([min(step.top_k, 50)]),
                "top_p": np.float32([step.top_p]),
            }
            row = sample(feeds)["code_indices"][0]
        codes.append(row.tolist())
        f_hat = f_hat + torch.from_numpy(CODEBOOK[row].T.reshape(1, 3, side, side))
        if scale + 1 < len(CONFIG.patch_nums):
            f_hat = F.interpolate(f_hat, size=(CONFIG.patch_nums[scale + 1],) * 2, mode="bicubic", align_corners=False)
    return codes, maps


def test_inputs_are_the_sum_of_all_coarser_scales() -> None:
    """Each scale reads what all before it add up to, enlarged step by step; each pass adds what the one before drew."""
    for params in (ONE, THREE):
        loop, graphs = make()
        image = begin(loop, params, number=2)
        run(loop, image)
        codes, maps = plain(params, 2, (2, 3))
        assert [row.tolist() for row in image.codes] == codes
        assert len(graphs["embed_image"].feeds) == len(maps) == 3 * len(params.passes)
        for feeds, expected in zip(graphs["embed_image"].feeds, maps, strict=True):
            row, other = feeds["features"]
            np.testing.assert_array_equal(row, other)
            np.testing.assert_allclose(row, expected.reshape(3, -1).T, atol=1e-5)


@pytest.mark.parametrize("most", [2, 3, 4, 6, None])
def test_more_images_than_an_engine_takes_are_drawn_in_parts(most: int | None) -> None:
    """Each has two rows; everybody's codes are those that it draws alone."""
    loop, graphs = make(pages=200, most=most)
    wanted = [(ONE, 0, (2,)), (THREE, 1, (3, 4)), (ONE, 2, ()), (THREE, 0, (5, 6, 7)), (replace(ONE, seed=9), 0, (2,))]
    images = [begin(loop, *arguments) for arguments in wanted]
    graphs["transformer"].feeds.clear()
    run(loop, *images)
    rows = [len(feeds["context"]) for feeds in graphs["transformer"].feeds]
    assert max(rows) == min(10, (most or 10) // 2 * 2)
    assert loop.transformer.max_rows == (most or sys.maxsize)
    for image, arguments in zip(images, wanted, strict=True):
        assert [row.tolist() for row in image.codes] == plain(*arguments)[0]
        assert image.codes[-1].dtype == np.int32
    for image in images:
        image.release()
    assert loop.transformer.pool.free == 200


def test_images_of_one_prompt_share_its_pages() -> None:
    loop, _ = make(pages=60)
    pool = loop.transformer.pool
    conditional, unconditional = loop.prefill((2, 3, 4, 5, 6)), loop.prefill((2,))
    assert pool.free == 60 - 2 - 1
    images = [loop.start(ONE, number, conditional, unconditional) for number in range(3)]
    assert pool.free == 60 - 2 - 1
    run(loop, *images)
    # Nobody wrote into the pages of the prompts.
    assert stored(loop, conditional) == [*range(2, 9)]
    assert stored(loop, unconditional) == [*range(6, 9)]
    for prefix in (conditional, unconditional, *(p for image in images for p in (image.conditional, image.unconditional))):
        prefix.table.release()
    assert pool.free == 60


def test_a_pool_that_is_too_small_says_so() -> None:
    loop, _ = make(pages=4)
    image = begin(loop, ONE)
    sample_scale(loop, image)
    sample_scale(loop, image)
    with pytest.raises(PagesExhausted):
        sample_scale(loop, image)
    image.release()
    assert loop.transformer.pool.free == 4


@pytest.mark.parametrize(
    ("graph", "scale"), [("sample", 0), *((graph, scale) for graph in ("transformer", "sample") for scale in (1, 2, 3))]
)
def test_an_image_that_is_not_finite_ends_alone(graph: str, scale: int) -> None:
    """At any scale and pass: its neighbours draw what they draw alone, and nothing of it is stored."""
    loop, graphs = make(pages=200)
    images = [begin(loop, ONE, 0), begin(loop, THREE, 1), begin(loop, ONE, 2)]
    for _ in range(scale):
        sample_scale(loop, *images)
    plain = graphs[graph].compute

    def failing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if graph == "transformer":
            found = {name: np.array(array) for name, array in plain(feeds).items()}
            bad = len(found["hidden"]) * 2 // 3 if len(found["hidden"]) > 2 else 0
            for name, rows in (("hidden", (bad,)), ("new_k", (slice(None), bad)), ("new_v", (slice(None), bad))):
                found[name][rows] = np.nan
            return found
        hidden = np.array(feeds["conditional"])
        hidden[1 if len(hidden) == 3 else 0] = np.nan
        return plain({**feeds, "conditional": hidden})

    graphs[graph].compute = failing
    sample_scale(loop, *images)
    graphs[graph].compute = plain
    assert [type(image.error) for image in images] == [type(None), NotFiniteError, type(None)]
    assert len(images[1].codes) == scale
    run(loop, images[0], images[2])
    for image, number in ((images[0], 0), (images[2], 2)):
        assert [row.tolist() for row in image.codes] == plain_codes(number)
    assert all(np.isfinite(np.asarray(pages.slots)).all() for pages in (loop.transformer._k, loop.transformer._v))
    for image in images:
        image.release()
    assert loop.transformer.pool.free == 200


def plain_codes(number: int) -> list[list[int]]:
    return plain(ONE, number, (2, 3))[0]


def test_a_prompt_that_is_not_finite_holds_no_page() -> None:
    loop, graphs = make()
    graphs["transformer"].compute = lambda feeds: {name: array * np.float32(np.nan) for name, array in transform(feeds).items()}
    with pytest.raises(NotFiniteError):
        loop.prefill([2, 3])
    assert loop.transformer.pool.free == 60
    assert not np.asarray(loop.transformer._k.slots).any()


@pytest.mark.parametrize("older", [False, True])
def test_greedy_passes_take_the_first_of_the_largest_logits(older: bool) -> None:
    """Where the graph is not certain, or was exported before graphs said so; drawn codes stay what they are."""
    loop, graphs = make()
    graph = graphs["sample"]

    def tied(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = dict(sample(feeds))
        logits = np.zeros_like(found["logits"])
        logits[..., [7, 30, 31]] = 1
        return {**found, "logits": logits, "certain": 0 * found["certain"]}

    graph.compute = tied
    if older:
        graph.outputs = tuple(spec for spec in graph.outputs if spec.name != "certain")
    drawn, greedy = begin(loop, ONE, 0), begin(loop, THREE, 1)
    run(loop, drawn, greedy)
    assert [row.tolist() for row in drawn.codes] == plain_codes(0)
    assert [set(row.tolist()) for row in greedy.codes[1:]] == [{7}] * 3
    assert set(greedy.codes[0].tolist()) != {7}


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take steps in few sizes: rows beyond the images' and queries beyond the prompt's are computed for nothing."""

    def drawn() -> tuple[list[list[list[int]]], list[int], int, set[tuple[int, ...]]]:
        loop, graphs = make()
        images = [begin(loop, THREE, number, (2, 3 + number)) for number in range(3)]
        run(loop, *images)
        shapes = {feeds["embeddings"].shape[:2] for feeds in graphs["transformer"].feeds}
        keys = stored(loop, images[2].unconditional)
        return [[codes.tolist() for codes in image.codes] for image in images], keys, loop.transformer.pool.free, shapes

    exact = drawn()
    assert exact[3] == {(1, 3), (1, 4), (6, 4), (6, 9), (6, 16)}
    monkeypatch.setattr(FakeGraph, "padded", lambda self, dim, size: -(-size // 8) * 8)
    padded = drawn()
    assert padded[:3] == exact[:3]
    assert padded[3] == {(1, 8), (8, 4), (8, 9), (8, 16)}
