"""`Understander`: questions about images, answered token by token over a shared pool of key/value pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from time import perf_counter

from tokenflow_sdk.arguments import items
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.language_model import LanguageModel
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.understanding.answering import Answer, Answering
from tokenflow_sdk.understanding.chat import Chat
from tokenflow_sdk.understanding.chat_text import ChatText
from tokenflow_sdk.understanding.image_features import ImageFeatures, ImageInput
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.scheduler import TokenScheduler
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop

__all__ = ["Understander"]


class Understander(LanguageModel[UnderstanderConfig, AnswerRequest]):
    """Answers questions about images, as TokenFlow models in the LLaVA layout do (docs/model.md, section 5).

    Make one with `from_pretrained`. Questions may come from several threads; answers that run at once share steps.
    """

    config_type = UnderstanderConfig

    def answer(
        self,
        images: ImageInput | Sequence[ImageInput],
        question: str,
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
            images: what it is about, one or a list: a path, bytes, file object, PIL image or u8 array; `Codes`, for which
                no encoder runs; or features, float [N, C].
            question: in words. Control tokens in it are text.
            preprocess: how pictures are made square, as in `Tokenizer.encode`; None: as the model was trained.
            color: what becomes of colour profiles, as in `Tokenizer.encode`.
            max_tokens, temperature, seed: as in `AnswerParams`, and before those of `params`. A random seed if none is given.
            params: these and all other settings.
            timeout: most seconds from this call to the end of the answer, waiting for others included; None is no limit.

        Raises:
            ArgumentError: no image, or a setting that cannot work.
            ImageError, ArrayError, CodesError: an image cannot be used, or comes from another tokenizer.
            PromptError: no question, or more tokens than the model reads.
            PagesExhausted: it would not fit into the pool even alone.
            RequestTimeoutError: it was not finished in time.
            BackendError, MissingPackageError: the backend cannot run.

        Codes of pictures that were prepared otherwise, as far as they say so, are a `PreparationWarning`.
        """
        chosen = AnswerParams.of(max_tokens, temperature, seed, params)
        self._answering.warn_of_preparation([images], preprocess)
        return self._answering.answers([self._request(images, question, chosen, preprocess, color, timeout)])[0]

    def stream(
        self,
        images: ImageInput | Sequence[ImageInput],
        question: str,
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
        timeout: float | None = None,
    ) -> RequestStream[str, Answer]:
        """The answer in pieces of whole characters, as they are found; `result()` of the stream is what `answer` returns.

        Closing the stream cancels the request and frees its pages. Arguments and errors as in `answer`; what is wrong with them
        is raised at once.
        """
        chosen = AnswerParams.of(max_tokens, temperature, seed, params)
        self._answering.warn_of_preparation([images], preprocess)
        return self._answering.stream(self._request(images, question, chosen, preprocess, color, timeout))

    def answer_batch(
        self,
        questions: Iterable[tuple[ImageInput | Sequence[ImageInput], str]],
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
        timeout: float | None = None,
    ) -> list[Answer]:
        """Answer several questions together, each a pair of images and question. Arguments and errors as in `answer`.

        Raises:
            ArgumentError: something else than pairs, e.g. one question.
        """
        hint = "Write answer_batch([(images, question), ...]), or answer(images, question) for one question."
        pairs = list(items("questions", questions, hint))
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ArgumentError("answer_batch takes pairs of images and question.", hint)
        chosen = AnswerParams.of(max_tokens, temperature, seed, params)
        self._answering.warn_of_preparation([images for images, _ in pairs], preprocess)
        requests = [self._request(images, question, chosen, preprocess, color, timeout) for images, question in pairs]
        return self._answering.answers(requests)

    def chat(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        turns: Iterable[tuple[str, str]] = (),
    ) -> Chat:
        """A conversation about some images. Arguments and errors about them as in `answer`.

        Args:
            turns: questions and answers, in words, after which it goes on, such as the `turns` of another chat.

        Raises:
            ArgumentError: turns that are no pairs.
        """
        self._answering.warn_of_preparation([images], preprocess)
        return Chat(self._answering, images, preprocess, color, turns)

    @cached_property
    def _answering(self) -> Answering:
        text = ChatText(self._text_tokenizer, self.config.template, self.config.vocabulary)
        return Answering(ImageFeatures(self.tokenizer, self.config), text, self._runner, self.config.context)

    def _request(
        self,
        images: ImageInput | Sequence[ImageInput],
        question: str,
        params: AnswerParams,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        timeout: float | None = None,
    ) -> AnswerRequest:
        began = perf_counter()
        blocks = self._answering.images(images, preprocess, color)
        return self._answering.first(blocks, question, params, False, began, timeout)

    def _reach(self) -> str:
        return f"{self.config.image_tokens} tokens a picture, {self.config.context} in all"

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> TokenScheduler:
        return TokenScheduler(TokenLoop(self.config, sessions, transformer))
