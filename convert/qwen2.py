"""The Qwen2 architecture as data: sizes, tensors with their shapes, and their names in GGUF."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convert.errors import CheckpointError

ARCHITECTURE = "Qwen2ForCausalLM"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MAX_SIZE = 1 << 24
"""No size in a config.json is larger; it keeps products of hostile sizes small."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How positions past the trained length are mapped: `kind` is "yarn" or "linear"."""

    kind: str
    factor: float
    original_context_length: int | None
    parameters: dict[str, float]


@dataclass(frozen=True, slots=True)
class Qwen2Config:
    """What config.json says of the model, checked."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the architecture; the last of `shape` is the row length, as in safetensors."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    layer_index: int | None


def parse_config(config: dict[str, Any], source: str) -> Qwen2Config:
    """Check a config.json and pick what the architecture needs of it.

    source: the file's path, for messages.
    Raises CheckpointError for another architecture and for a value missing, odd or out of range.
    """
    reader = _ConfigReader(config, source)
    reader.check_architecture()
    n_heads = reader.size("num_attention_heads")
    n_kv_heads = reader.size("num_key_value_heads", default=n_heads)
    hidden_size = reader.size("hidden_size")
    if n_heads % n_kv_heads:
        raise reader.error(f"{n_heads} attention heads do not share {n_kv_heads} key heads evenly")
    if "head_dim" not in config and hidden_size % n_heads:
        raise reader.error(f"hidden_size {hidden_size} does not divide by {n_heads} heads")
    n_layers = reader.size("num_hidden_layers")
    reader.check_attention(n_layers)
    rope = reader.rope()
    return Qwen2Config(
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=reader.size("head_dim", default=hidden_size // n_heads),
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings"),
        rms_norm_eps=reader.number(config, "rms_norm_eps"),
        rope_theta=reader.number(rope, "rope_theta"),
        rope_scaling=reader.rope_scaling(rope),
        tied_embeddings=reader.flag("tie_word_embeddings"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        eos_token_ids=reader.token_ids("eos_token_id"),
        pad_token_id=next(iter(reader.token_ids("pad_token_id")), None),
    )


def tensor_specs(config: Qwen2Config) -> Iterator[TensorSpec]:
    """All tensors of the model in the order of its computation, which is that of our files."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer_tensors = (
        ("input_layernorm.weight", "attn_norm.weight", (hidden,)),
        ("self_attn.q_proj.weight", "attn_q.weight", (q_size, hidden)),
        ("self_attn.q_proj.bias", "attn_q.bias", (q_size,)),
        ("self_attn.k_proj.weight", "attn_k.weight", (kv_size, hidden)),
        ("self_attn.k_proj.bias", "attn_k.bias", (kv_size,)),
        ("self_attn.v_proj.weight", "attn_v.weight", (kv_size, hidden)),
        ("self_attn.v_proj.bias", "attn_v.bias", (kv_size,)),
        ("self_attn.o_proj.weight", "attn_output.weight", (hidden, q_size)),
        ("post_attention_layernorm.weight", "ffn_norm.weight", (hidden,)),
        ("mlp.gate_proj.weight", "ffn_gate.weight", (inner, hidden)),
        ("mlp.up_proj.weight", "ffn_up.weight", (inner, hidden)),
        ("mlp.down_proj.weight", "ffn_down.weight", (hidden, inner)),
    )
    vocab_shape = (config.vocab_size, hidden)
    yield TensorSpec(EMBEDDINGS, "token_embd.weight", vocab_shape, None)
    for layer in range(config.n_layers):
        for name, gguf_name, shape in layer_tensors:
            full_name, full_gguf_name = f"model.layers.{layer}.{name}", f"blk.{layer}.{gguf_name}"
            yield TensorSpec(full_name, full_gguf_name, shape, layer)
    yield TensorSpec("model.norm.weight", "output_norm.weight", (hidden,), None)
    if not config.tied_embeddings:
        yield TensorSpec(HEAD, "output.weight", vocab_shape, None)


def is_ignorable(name: str, config: Qwen2Config) -> bool:
    """Tensors that a checkpoint may hold beside the model's: a table of rope, the tied head."""
    tied_head = config.tied_embeddings and name == HEAD
    return tied_head or name.endswith(".rotary_emb.inv_freq")


class _ConfigReader:
    """Typed access to config.json; every defect becomes a CheckpointError with the key's name."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {problem}; use the checkpoint's own config.json")

    def check_architecture(self) -> None:
        found = self.config.get("architectures")
        if found != [ARCHITECTURE]:
            named = ", ".join(map(str, found)) if isinstance(found, list) else "none"
            raise CheckpointError(
                f"{self.source}: the architecture is {named} and {ARCHITECTURE} is needed; "
                "give a QwQ or Qwen2 checkpoint"
            )
        if "quantization_config" in self.config:
            raise CheckpointError(
                f"{self.source}: the checkpoint is quantized already; give the unquantized one"
            )

    def check_attention(self, n_layers: int) -> None:
        activation = self.config.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act is {activation!r} and only 'silu' is known")
        first_sliding = self.config.get("max_window_layers", n_layers)
        if self.flag("use_sliding_window") and (
            not isinstance(first_sliding, int) or first_sliding < n_layers
        ):
            raise self.error(
                f"sliding windows start at layer {first_sliding} of {n_layers}, "
                "and no GGUF reader has them for Qwen2"
            )

    def size(self, key: str, *, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise self.error(f"{key} is {_short(value)}, not a whole number from 1 to {MAX_SIZE}")
        return value

    def number(self, table: dict[str, Any], key: str) -> float:
        if key not in table:
            raise self.error(f"{key} is missing")
        value = table[key]
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(f"{key} is {_short(value)}, not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {_short(value)}, neither true nor false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < MAX_SIZE:
                raise self.error(f"{key} is {_short(value)}, not a token id")
        return tuple(ids)

    def rope(self) -> dict[str, Any]:
        """One table of rope settings from either spelling: rope_parameters, or two old keys."""
        table: dict[str, Any] = {}
        if "rope_theta" in self.config:
            table["rope_theta"] = self.config["rope_theta"]
        for key in ("rope_scaling", "rope_parameters"):
            settings = self.config.get(key)
            if settings is None:
                continue
            if not isinstance(settings, dict):
                raise self.error(f"{key} is {_short(settings)}, not a table")
            table |= settings
        return table

    def rope_scaling(self, rope: dict[str, Any]) -> RopeScaling | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind not in ("yarn", "linear"):
            raise self.error(f"rope type {_short(kind)} is not one of default, linear, yarn")
        original = None
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings")
            if type(original) is not int or not 1 <= original <= MAX_SIZE:
                raise self.error(f"original_max_position_embeddings is {_short(original)}")
        names = ("extrapolation_factor", "attention_factor", "beta_fast", "beta_slow")
        parameters = {name: self.number(rope, name) for name in names if rope.get(name) is not None}
        return RopeScaling(kind, self.number(rope, "factor"), original, parameters)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
