"""all-MiniLM-L6-v2 by PyTorch, from the same files, written apart from the demo's: its oracle and its peer."""

import json

import torch
from safetensors.torch import load
from torch.nn import functional as F

from numba_attention.models.sentence import CONFIG, WEIGHTS, find_model


class Encoder:
    """BERT as Hugging Face's transformers computes it with SDPA, and the pooling of sentence-transformers."""

    def __init__(self, dtype=torch.float32):
        folder = find_model()
        self.config = json.loads(folder.joinpath(CONFIG).read_text())
        tensors = load(folder.joinpath(WEIGHTS).read_bytes())
        self.state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def layer_norm(self, x, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config["layer_norm_eps"])

    def look_up(self, ids):
        x = self.state["embeddings.word_embeddings.weight"][ids]
        x = x + self.state["embeddings.token_type_embeddings.weight"][torch.zeros_like(ids)]
        x = x + self.state["embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self.layer_norm(x, "embeddings.LayerNorm")

    def hidden(self, ids, valid):
        """Last hidden states of ids (B, L), of which `valid` (B, L) says which are no padding."""
        x = self.look_up(ids)
        mask = None if valid.all() else valid[:, None, None, :]
        heads = self.config["num_attention_heads"]
        for n in range(self.config["num_hidden_layers"]):
            name = f"encoder.layer.{n}"
            q, k, v = (
                self.linear(x, f"{name}.attention.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)
            attended = self.linear(attended, f"{name}.attention.output.dense")
            x = self.layer_norm(attended + x, f"{name}.attention.output.LayerNorm")
            up = F.gelu(self.linear(x, f"{name}.intermediate.dense"))
            x = self.layer_norm(self.linear(up, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")
        return x

    @torch.inference_mode()
    def embed_tokens(self, sequences, batch=32):
        """Embed lists of token ids, sorted by length and `batch` at a time."""
        dtype = self.state["embeddings.word_embeddings.weight"].dtype
        embeddings = torch.empty(len(sequences), self.config["hidden_size"], dtype=dtype)
        order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            lengths = torch.tensor([len(sequences[n]) for n in chosen])
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequences[n]) for n in chosen], batch_first=True)
            valid = torch.arange(ids.shape[1]) < lengths[:, None]
            mean = (self.hidden(ids, valid) * valid[..., None]).sum(1) / lengths[:, None]
            embeddings[chosen] = F.normalize(mean, dim=1)
        return embeddings.numpy()


class ModuleEncoder(Encoder):
    """The same through ``torch.nn.TransformerEncoder``, whose fast path for evaluation leaves padding out."""

    def __init__(self):
        super().__init__()
        config = self.config
        layer = torch.nn.TransformerEncoderLayer(
            config["hidden_size"],
            config["num_attention_heads"],
            config["intermediate_size"],
            activation="gelu",
            layer_norm_eps=config["layer_norm_eps"],
            batch_first=True,
        )
        self.module = torch.nn.TransformerEncoder(layer, config["num_hidden_layers"]).eval()
        names = {
            "self_attn.out_proj": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm2": "output.LayerNorm",
        }
        state = {}
        for n in range(config["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                parts = [self.state[f"encoder.layer.{n}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
                state[f"layers.{n}.self_attn.in_proj_{kind}"] = torch.cat(parts)
                for own, name in names.items():
                    state[f"layers.{n}.{own}.{kind}"] = self.state[f"encoder.layer.{n}.{name}.{kind}"]
        self.module.load_state_dict(state)

    def hidden(self, ids, valid):
        return self.module(self.look_up(ids), src_key_padding_mask=None if valid.all() else ~valid)
