"""The small model of the default run: a Qwen2 for a procedural task, warm-started on its demonstrations."""
import hashlib
import json
import math
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import data
from model import Model


def new_model(cfg, forward, device="cpu", write=True) -> Path:
    """The checkpoint directory of the model that cfg (train.Config) describes, cached by its recipe under runs/warmstart; made
    now if it is not there and `write` (one rank). `forward` is train.forward: log-probs of response tokens."""
    if cfg.data not in data.TASKS:
        raise ValueError(f"--data {cfg.data} needs --model: a new small model is built for {', '.join(data.TASKS)} alone")
    tokenizer = data.char_tokenizer(cfg.data)
    eos = tokenizer.convert_tokens_to_ids(data.END)
    raw = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=len(tokenizer), hidden_size=cfg.width,
               intermediate_size=3 * cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu",
               rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, initializer_range=0.1,
               eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    recipe = [raw, cfg.data, cfg.seed, cfg.skill_steps, cfg.habit_steps, tokenizer.get_vocab(), "v1"]
    path = Path("runs/warmstart") / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    if path.is_dir() or not write:
        return path
    model = Model.from_scratch(raw, cfg.seed, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    phases = [("skill", cfg.skill_steps), ("habit", cfg.habit_steps if cfg.skill_steps else 0)]
    with tqdm(total=sum(n for _, n in phases), desc="warm start on demonstrations", mininterval=0.5) as bar:
        for phase, steps in phases:
            texts = list(zip(*data.demos(cfg.data, 128 * steps, phase, cfg.seed))) or [(), ()]
            demos = list(zip(*(tokenizer(list(some)).input_ids if some else () for some in texts)))
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
                rows = demos[128 * step:128 * (step + 1)]
                logp, _, _ = forward(model, [p + r for p, r in rows], [len(p) for p, _ in rows])
                (-logp.mean()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix(nll=f"{-logp.mean().item():.3f}", phase=phase, refresh=False)
                bar.update()
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        model.source = Path(aside)
        model.save_pretrained(path)
    return path
