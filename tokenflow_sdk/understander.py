"""`Understander`: questions about pictures, answered token by token over a shared pool of key/value pages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions, open_onnxruntime
from tokenflow_sdk.backends.choice import EngineOptions
from tokenflow_sdk.bundle import Bundle, find_bundle
from tokenflow_sdk.chat_text import ChatText
from tokenflow_sdk.config import UnderstanderConfig
from tokenflow_sdk.paged_model import PagedModel, Running
from tokenflow_sdk.picture_features import Picture, PictureFeatures
from tokenflow_sdk.scheduler import PAGE_SIZE
from tokenflow_sdk.token_loop import TokenLoop, Turn
from tokenflow_sdk.token_prompt import TokenPrompt
from tokenflow_sdk.token_sampling import AnswerParams
from tokenflow_sdk.token_scheduler import TokenScheduler, default_pages
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.transformer import PagedTransformer

if TYPE_CHECKING:
    from tokenflow_sdk.engine_recipe import EnginePlan

__all__ = ["Answer", "Chat", "Understander"]


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    `finish` says what ended it: a `stop` token, which is not in `token_ids`, or its `length`. Of the `prompt_tokens`, pictures
    included, `cached_tokens` were not run again. `timings` are seconds from the question to each token, and to the one that
    ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    timings: tuple[float, ...]
    params: AnswerParams


class Understander(PagedModel[UnderstanderConfig, TokenScheduler]):
    """Answers questions about pictures, as TokenFlow models in the LLaVA layout do (arXiv 2412.03069, spec section 5).

    Make one with `from_pretrained`. Questions may come from several threads; answers that run at once share steps.
    """

    def __init__(
        self,
        bundle: Bundle[UnderstanderConfig],
        tokenizer: Tokenizer,
        options: SessionOptions,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        open_session: OpenSession = open_onnxruntime,
    ) -> None:
        self._features = PictureFeatures(tokenizer, bundle.config)
        self._text = ChatText(bundle.path / bundle.asset("tokenizer").name, bundle.config.template)
        super().__init__(bundle, tokenizer, options, pages, page_size, open_session)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        backend: str = "auto",
        plan: EnginePlan | str | None = None,
        build: bool = True,
        serve_while_building: bool = False,
        cuda_graphs: bool = False,
    ) -> Understander:
        """Open an understander bundle, verify its files, and load its graphs.

        Args:
            name: a bundle's directory, or a Hugging Face hub id.
            tokenizer: the tokenizer of its pictures; None looks where the bundle was exported with it.
            device, providers, threads: as in `Tokenizer.from_pretrained`.
            pages: pages in the pool; None holds eight questions about eight pictures.
            page_size: tokens in a page; TensorRT engines take the default only.
            backend, plan, build, serve_while_building, cuda_graphs: see `tokenflow_sdk.backends.choice.EngineOptions`.

        Raises:
            BundleError, MissingPackageError, ArgumentError: see `tokenflow_sdk.errors`.
            CodebookMismatchError: the tokenizer has another codebook.
            BackendError: the backend asked for does not work here; `EngineBuildError`, `EngineRefusedError` say more.
        """
        options = SessionOptions(device, None if providers is None else tuple(providers), threads)
        bundle = Bundle.open(find_bundle(name, UnderstanderConfig.kind), UnderstanderConfig)
        wanted = EngineOptions(backend, plan, build, serve_while_building, 1, cuda_graphs)
        return cls._open_pretrained(bundle, tokenizer, options, wanted, pages, page_size)

    @staticmethod
    def _default_pages(config: UnderstanderConfig, page_size: int) -> int:
        return default_pages(config, page_size)

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> TokenScheduler:
        return TokenScheduler(TokenLoop(self.config, sessions, transformer))

    def answer(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
            pictures: what it is about, one or a list: a path, bytes, file object, PIL image or u8 array; `Codes`, for which
                no encoder runs; or features, float [N, C].
            question: in words. Control tokens in it are text.
            max_tokens, temperature, seed: as in `AnswerParams`, and before those of `params`. A random seed if none is given.
            params: these and all other settings.

        Raises:
            ArgumentError: no picture, or a setting that cannot work.
            ImageError, ArrayError, CodesError: a picture cannot be used, or comes from another tokenizer.
            PromptError: no question, or more tokens than the model reads.
            PagesExhausted: it would not fit into the pool even alone.
            BackendError, MissingPackageError: the engine cannot run.
        """
        return self._drain([self._turn(pictures, question, _params(max_tokens, temperature, seed, params))])[0]

    def stream(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Iterator[str]:
        """The answer in pieces of whole characters, as they are found. Closing the iterator cancels it and frees its pages.

        Arguments and errors as in `answer`; what is wrong with them is raised at once.
        """
        turn = self._turn(pictures, question, _params(max_tokens, temperature, seed, params))
        return self._pieces(turn)

    def answer_batch(
        self,
        questions: Iterable[tuple[Picture | Sequence[Picture], str]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> list[Answer]:
        """Answer several questions together, each a pair of pictures and question. Arguments and errors as in `answer`."""
        chosen = _params(max_tokens, temperature, seed, params)
        return self._drain([self._turn(pictures, question, chosen) for pictures, question in questions])

    def chat(self, pictures: Picture | Sequence[Picture]) -> Chat:
        """A conversation about some pictures. Errors about them as in `answer`."""
        return Chat(self, pictures)

    def _turn(self, pictures: Picture | Sequence[Picture], question: str, params: AnswerParams) -> Turn:
        began = perf_counter()
        return self._checked(Turn(self._text.first(self._features.of_all(pictures), question), params, False, began))

    def _checked(self, turn: Turn) -> Turn:
        self._running.scheduler.check(turn)
        return turn

    def _pieces(self, turn: Turn) -> Iterator[str]:
        text = self._text.stream()
        with self._submitted([turn]) as running:
            for count in range(1, turn.params.max_tokens + 1):
                self._advance(running, turn, count)
                if len(turn.tokens) < count:
                    break
                if piece := text.push(turn.tokens[count - 1]):
                    yield piece
            if rest := text.flush():
                yield rest

    def _drain(self, turns: Sequence[Turn]) -> list[Answer]:
        with self._submitted(turns) as running:
            for turn in turns:
                self._advance(running, turn, turn.params.max_tokens)
        return [self._answer(turn) for turn in turns]

    def _answer(self, turn: Turn) -> Answer:
        assert turn.finish is not None
        text = self._text.stream()
        return Answer(
            text="".join([*map(text.push, turn.tokens), text.flush()]),
            token_ids=tuple(turn.tokens),
            finish=turn.finish,
            prompt_tokens=len(turn.prompt),
            cached_tokens=turn.cached,
            timings=tuple(turn.timings),
            params=turn.params,
        )

    def _advance(self, running: Running[TokenScheduler], turn: Turn, count: int) -> None:
        """Run steps, whoever they are for, until `turn` has `count` tokens or is finished."""
        while turn.finish is None and len(turn.tokens) < count:
            with self._lock:
                self._check_open()
                if turn.error is not None:
                    raise turn.error
                if turn.finish is None and len(turn.tokens) < count:
                    running.scheduler.step()


class Chat:
    """A conversation about some pictures: each question is asked after all earlier ones and their answers.

    The pages of earlier turns stay while the pool has room, and are computed again where it had not. One question at a time.
    """

    def __init__(self, owner: Understander, pictures: Picture | Sequence[Picture]) -> None:
        self._owner = owner
        self._images = owner._features.of_all(pictures)
        self._last: Turn | None = None
        self.turns: list[tuple[str, str]] = []
        """Questions and answers so far."""

    def ask(
        self,
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Answer:
        """The next question. Arguments and errors as in `Understander.answer`."""
        turn = self._turn(question, _params(max_tokens, temperature, seed, params))
        (answer,) = self._owner._drain([turn])
        self._remember(turn, question, answer.text)
        return answer

    def stream(
        self,
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Iterator[str]:
        """As `ask`, in pieces as in `Understander.stream`. A question whose answer is not read to its end was never asked."""
        turn = self._turn(question, _params(max_tokens, temperature, seed, params))
        return self._pieces(turn, question)

    def _pieces(self, turn: Turn, question: str) -> Iterator[str]:
        pieces = []
        for piece in self._owner._pieces(turn):
            pieces.append(piece)
            yield piece
        self._remember(turn, question, "".join(pieces))

    def _turn(self, question: str, params: AnswerParams) -> Turn:
        began = perf_counter()
        return self._owner._checked(Turn(self._prompt(question), params, True, began))

    def _prompt(self, question: str) -> TokenPrompt:
        text, last = self._owner._text, self._last
        if last is None:
            return text.first(self._images, question)
        read = len(last.history) - len(last.prompt)
        return text.next(last.history, last.tokens[read:], question)

    def _remember(self, turn: Turn, question: str, answer: str) -> None:
        self._last = turn
        self.turns.append((question, answer))


def _params(max_tokens: int | None, temperature: float | None, seed: int | None, params: AnswerParams | None) -> AnswerParams:
    if params is None:
        params = AnswerParams(seed=secrets.randbelow(2**63))
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return replace(params, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
