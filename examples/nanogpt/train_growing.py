"""
A training loop of nanoGPT's shape, for one device: ``python -m examples.nanogpt.train --max_iters=200 --compile=True``
Every setting below is overridden by ``--name=value``; ``--init_from=resume`` goes on from ``out_dir``.
"""

import math
import os
import sys
import time
from ast import literal_eval
from contextlib import nullcontext

import torch

import fxgrow
from examples.gpt.data import decode, encode, python_help
from examples.nanogpt.model import GPT, GPTConfig

# -----------------------------------------------------------------------------
out_dir = "out/nanogpt"
eval_interval = 100
log_interval = 10
eval_iters = 10
always_save_checkpoint = True
init_from = "scratch"  # or "resume"
# data
gradient_accumulation_steps = 2
batch_size = 8
block_size = 64
# model
n_layer = 2
n_head = 2
n_embd = 32
dropout = 0.0
bias = True
# adamw
learning_rate = 3e-3
max_iters = 300
weight_decay = 1e-1
beta1, beta2 = 0.9, 0.99
grad_clip = 1.0
# learning rate decay
decay_lr = True
warmup_iters = 20
lr_decay_iters = 300
min_lr = 3e-4
# growth
wider_at = 100
deeper_at = 200
# system
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
compile = False
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, int | float | bool | str)]
for argument in sys.argv[1:]:
    key, _, value = argument.removeprefix("--").partition("=")
    assert key in config_keys, f"no setting {key!r}"
    globals()[key] = value if isinstance(globals()[key], str) else literal_eval(value)
config = {k: globals()[k] for k in config_keys}
# -----------------------------------------------------------------------------
noise = {"seed": 1}  # lets the copies part
growths = {
    wider_at: [{"op": "widen", "axis": f"*/{a}", "factor": 2, "noise": noise} for a in ("heads", "residual", "hidden")],
    deeper_at: [{"op": "deepen", "stack": "transformer.h", "factor": 2}],
}

os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337)
device_type = "cuda" if "cuda" in device else "cpu"
ptdtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
ctx = nullcontext() if device_type == "cpu" else torch.amp.autocast(device_type=device_type, dtype=ptdtype)

tokens = encode(python_help())
data = {"train": tokens[: int(0.9 * len(tokens))], "val": tokens[int(0.9 * len(tokens)) :]}


def get_batch(split, number):
    # batches are numbered, so that a resumed run sees those that it would have seen
    generator = torch.Generator().manual_seed(number)
    ix = torch.randint(len(data[split]) - block_size, (batch_size,), generator=generator)
    x = torch.stack([data[split][i : i + block_size] for i in ix])
    y = torch.stack([data[split][i + 1 : i + 1 + block_size] for i in ix])
    return x.to(device), y.to(device)


iter_num = 0
best_val_loss = 1e9

model_args = {k: config[k] for k in ["n_layer", "n_head", "n_embd", "block_size", "bias", "dropout"]}
checkpoint = None
if init_from == "resume":
    print(f"Resuming training from {out_dir}")
    checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location=device)
    for k in ["n_layer", "n_head", "n_embd", "block_size", "bias"]:
        model_args[k] = checkpoint["model_args"][k]
model = GPT(GPTConfig(**model_args))
if init_from == "resume":
    state_dict = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    model.load_state_dict(state_dict)
    iter_num = checkpoint["iter_num"]
    best_val_loss = checkpoint["best_val_loss"]
model.to(device)

# initialize a GradScaler. If enabled=False scaler is a no-op
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == "float16"))

optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2))
if init_from == "resume":
    optimizer.load_state_dict(checkpoint["optimizer"])
checkpoint = None  # free up memory

if compile:
    print("compiling the model... (takes a ~minute)")
    model = torch.compile(model)


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            X, Y = get_batch(split, k)
            with ctx:
                _, loss = model(X, Y)
            losses[k] = loss.item()
        out[split] = losses.mean()
    model.train()
    return out


# learning rate decay scheduler (cosine with warmup)
def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


# training loop
X, Y = get_batch("train", iter_num * gradient_accumulation_steps)  # fetch the very first batch
t0 = time.time()
local_iter_num = 0  # number of iterations in the lifetime of this process
running_mfu = -1.0
while True:
    # determine and set the learning rate for this iteration
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr

    # evaluate the loss on train/val sets and write checkpoints
    if iter_num % eval_interval == 0:
        losses = estimate_loss()
        print(f"step {iter_num}: train loss {losses['train']:.6f}, val loss {losses['val']:.6f}")
        if losses["val"] < best_val_loss or always_save_checkpoint:
            best_val_loss = losses["val"]
            if iter_num > 0:
                checkpoint = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "model_args": model_args,
                    "iter_num": iter_num,
                    "best_val_loss": best_val_loss,
                    "config": config,
                }
                print(f"saving checkpoint to {out_dir}")
                torch.save(checkpoint, os.path.join(out_dir, "ckpt.pt"))

    # grow the model, the optimizer that trains it, and what the checkpoint says of it
    if iter_num in growths:
        growth = fxgrow.grow(model, growths[iter_num], (X, Y))
        growth.apply_(model)
        growth.carry_(optimizer)
        model_args.update({k: getattr(model.config, k) for k in model_args})

    # forward backward update, with gradient accumulation to simulate larger batch size
    # and using the GradScaler if data type is float16
    for micro_step in range(gradient_accumulation_steps):
        with ctx:
            _, loss = model(X, Y)
            loss = loss / gradient_accumulation_steps
        # immediately async prefetch next batch while model is doing the forward pass on the GPU
        X, Y = get_batch("train", iter_num * gradient_accumulation_steps + micro_step + 1)
        scaler.scale(loss).backward()
    # clip the gradient
    if grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # step the optimizer and scaler if training in fp16
    scaler.step(optimizer)
    scaler.update()
    # flush the gradients as soon as we can, no need for this memory anymore
    optimizer.zero_grad(set_to_none=True)

    # timing and logging
    t1 = time.time()
    dt = t1 - t0
    t0 = t1
    if iter_num % log_interval == 0:
        lossf = loss.item() * gradient_accumulation_steps
        if local_iter_num >= 5:  # let the training loop settle a bit
            mfu = model.estimate_mfu(batch_size * gradient_accumulation_steps, dt)
            running_mfu = mfu if running_mfu == -1.0 else 0.9 * running_mfu + 0.1 * mfu
        print(f"iter {iter_num}: loss {lossf:.6f}, time {dt * 1000:.2f}ms, mfu {running_mfu * 100:.4f}%")
    iter_num += 1
    local_iter_num += 1

    # termination conditions
    if iter_num > max_iters:
        break

model.eval()
print(decode(model.generate(encode("The ").unsqueeze(0).to(device), 100, top_k=20)[0].cpu()))
