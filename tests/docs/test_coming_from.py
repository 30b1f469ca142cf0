"""The page for people who come from other scripts has every flag of theirs, and only keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inlaid import config
from support.pages import DOCS, ROOT, rows, schema

PAGE = DOCS / "how-to/coming-from.md"

COGVIDEOX = """
pretrained_model_name_or_path revision variant cache_dir data_root dataset_file video_column
caption_column id_token load_tensors random_flip dataloader_num_workers pin_memory height_buckets
width_buckets frame_buckets validation_prompt validation_images validation_prompt_separator
num_validation_videos validation_epochs validation_steps guidance_scale use_dynamic_cfg
enable_model_cpu_offload seed rank lora_alpha mixed_precision output_dir height width video_reshape_mode
fps max_num_frames skip_frames_start skip_frames_end train_batch_size num_train_epochs max_train_steps
checkpointing_steps checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
enable_slicing enable_tiling noised_image_dropout ignore_learned_positional_embeddings optimizer use_8bit
use_4bit use_torchao beta1 beta2 beta3 weight_decay epsilon max_grad_norm use_cpu_offload_optimizer
offload_gradients tracker_name push_to_hub hub_token hub_model_id logging_dir allow_tf32 nccl_timeout
report_to
"""
PRECOMPUTE = """
model_id max_num_frames max_sequence_length target_fps batch_size dtype num_artifact_workers
save_image_latents save_latents_and_embeddings use_slicing use_tiling
"""
MOCHI = """
pretrained_model_name_or_path cast_dit compile_dit data_root caption_dropout dataloader_num_workers
pin_memory validation_prompt validation_images validation_prompt_separator num_validation_videos
validation_epochs enable_slicing enable_tiling enable_model_cpu_offload fps height width seed rank
lora_alpha target_modules output_dir train_batch_size num_train_epochs max_train_steps
gradient_checkpointing learning_rate scale_lr lr_warmup_steps checkpointing_steps optimizer weight_decay
resume_from_checkpoint report_to push_to_hub
"""
PREPARE = "folder output_folder num_frames resolution force_upsample model_id shape overwrite"


def named(column: int) -> list[str]:
    """What stands in backticks in a column of all tables."""
    return [name for row in rows(PAGE) for name in re.findall("`(.+?)`", row[column])]


@pytest.mark.parametrize(
    "flags", [COGVIDEOX, PRECOMPUTE, MOCHI, PREPARE], ids=["cogvideox", "precompute", "mochi", "prepare"]
)
def test_every_flag_is_there(flags: str) -> None:
    assert set(flags.split()) - set(named(0)) == set()


def test_no_flag_is_made_up() -> None:
    assert set(named(0)) - set(f"{COGVIDEOX} {PRECOMPUTE} {MOCHI} {PREPARE}".split()) == set()


def test_every_key_is_in_the_schema() -> None:
    known = schema()
    top = {*config.Config.model_fields}
    for code in named(1):
        key = code.partition("=")[0]
        section, _, name = key.partition(".")
        assert name in known[section] if name else section in top, f"`{code}` is in no recipe"
    assert len(named(1)) > 40


def test_every_flag_has_a_key_or_a_reason() -> None:
    for flag, key, remark in rows(PAGE):
        assert re.search("`.+`", key) or key == "none", flag
        assert key != "none" or remark, f"{flag}: why is there none?"


def test_it_is_found() -> None:
    pages = [ROOT / "README.md", *(DOCS / "how-to").glob("*.md")]
    assert [
        p
        for p in pages
        if p != PAGE and re.search(rf"\]\([^)]*{re.escape(PAGE.name)}", Path(p).read_text("utf-8"))
    ]
