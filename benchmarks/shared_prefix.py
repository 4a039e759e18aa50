"""
Questions of reasoning_gym begin alike. What all rows of a forward pass share is computed once here, so that rows of
the comparison with long questions take a third of the time. The policy's answers and gradients are the same up to
rounding.
"""

import functools

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def share_prefix(model: PreTrainedModel, least: int = 16) -> None:
    """
    Make a model compute what all rows begin with once per forward pass, also where it fills a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model with rotary positions. Its decoder's `forward` is wrapped.
        least (`int`, *optional*, defaults to `16`):
            Tokens that must be shared for it to be worth it.
    """
    decoder = model.base_model
    plain = decoder.forward

    @functools.wraps(plain)
    def forward(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        given = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        fills = past_key_values is not None and past_key_values.get_seq_length() == 0
        usable = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and not any(kwargs.values())
        if input_ids is None or not usable or not (fills or (past_key_values is None and not use_cache)):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **given)
        starts, shared = find_prefix(input_ids, attention_mask)
        if shared < least:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **given)

        rows, width = input_ids.shape
        cache = DynamicCache(config=decoder.config)
        prefix = input_ids[0, starts[0] : starts[0] + shared][None]
        hidden = plain(input_ids=prefix, past_key_values=cache, use_cache=True).last_hidden_state
        cache.batch_repeat_interleave(rows)
        first = int(starts.min()) + shared  # the column at which the first row goes on
        positions = torch.arange(width, device=input_ids.device) - starts[:, None]
        rest = attention_mask[:, first:] * (positions[:, first:] >= shared)
        outputs = plain(
            input_ids=input_ids[:, first:],
            attention_mask=torch.cat([torch.ones_like(input_ids[:, :shared]), rest], 1),
            position_ids=positions[:, first:].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        # Where each column of the input lies behind the prefix and the rest; what padding gets does not matter.
        source = torch.where(positions < shared, positions.clamp(min=0), positions + starts[:, None] - first + shared)
        hidden = torch.cat([hidden.expand(rows, -1, -1), outputs.last_hidden_state], 1)
        hidden = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))
        if fills:
            for index, layer in enumerate(cache.layers):
                where = source[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[-1])
                past_key_values.update(layer.keys.gather(2, where), layer.values.gather(2, where), index)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    decoder.forward = forward


def find_prefix(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Columns at which the rows begin after their left padding, shape `(B,)`, and how many tokens all of them share.

    Args:
        input_ids (`torch.Tensor`):
            Tokens, shape `(B, T)`.
        attention_mask (`torch.Tensor`):
            1 for tokens, 0 for padding on either side, shape `(B, T)`.
    """
    starts = attention_mask.argmax(1)
    columns = starts[:, None] + torch.arange(input_ids.shape[1] - int(starts.max()), device=input_ids.device)
    tokens = input_ids.gather(1, columns)
    same = (tokens == tokens[0]).all(0) & attention_mask.gather(1, columns).all(0)
    return starts, min(int(same.cumprod(0).sum()), len(same) - 1)
