"""LLaVA-1.5, stage 1: a CLIP tower and a text model become a LLaVA whose projector learns from captions.

Trains the projector, a new MLP. Frozen in 16 bit: CLIP tower and language model (Llama, Vicuna, Mistral or Qwen). The
loss covers the caption and its line break, in LLaVA's plain format without roles and stop token. Differs from the other
recipes in that it assembles its model, and saves another template than it trains by: Vicuna's, for stage 2.

    accelerate launch recipes/llava_pretrain.py --dataset_name LLaVA-Pretrain/blip_laion_cc_sbu_558k.json

Data: liuhaotian/LLaVA-Pretrain, images.zip unpacked beside the JSON. Vicuna needs sentencepiece.
Not measured yet. Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

from dataclasses import dataclass, field

import vlm_sft
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import anls
from vlm_sft.models.llava import assemble_llava, plain_template

TRAINS = {"projector": "full"}  # part -> "lora", "full" or names of layers; a part that is not named stays frozen
METRICS = {"anls": anls}  # of generated captions of held-out rows: similarity to the reference, 0 to 1


@dataclass
class RecipeArguments(vlm_sft.DataArguments):
    model_name_or_path: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Text model, Hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the text model."})
    vision_tower: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "CLIP: Hub id or folder."})
    dataset_name: str = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/llava_pretrain"
    max_length: int | None = 2048  # LLaVA-1.5's own limit; an image takes 576 of it. A longer row is an error
    num_train_epochs: float = 1  # this and the rates: LLaVA-1.5's scripts/v1_5/pretrain.sh
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 16  # 256 rows a step on one GPU; with eight GPUs set 2
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # below 1, a share of all steps
    eval_steps: float | None = 0.2  # a share of all steps; and a checkpoint as often, of the whole model
    save_total_limit: int | None = 2  # the newest and the one before it


def to_conversation(row: dict) -> dict:
    """A row of LLaVA-Pretrain as image and caption: the plain format leaves the question out."""
    caption = [{"type": "text", "text": row["conversations"][-1]["value"] + "\n"}]
    question = {"role": "user", "content": [{"type": "image"}]}
    return {"messages": [question, {"role": "assistant", "content": caption}], "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, seed=training_args.seed, **args.reading
    )
    model, processor = assemble_llava(
        args.vision_tower, args.model_name_or_path, language_revision=args.model_revision, seed=training_args.seed
    )
    peft_config = vlm_sft.lora_config(model, TRAINS)  # None: no part takes adapters
    padding_free = vlm_sft.enable_padding_free(model)  # with FlashAttention, rows need no padding
    plain = {"chat_template_kwargs": {"chat_template": plain_template(processor.tokenizer)}, "stop_token": None}
    collator = vlm_sft.ChatCollator(processor, max_length=training_args.max_length, padding_free=padding_free, **plain)
    data = vlm_sft.check_rows(data, collator, **args.checking)  # opens and encodes each row once
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        peft_config=peft_config,
        callbacks=vlm_sft.guards(model),
    )
    vlm_sft.evaluate_answers(trainer, data["test"], METRICS)
    proof = vlm_sft.prove(trainer, TRAINS, args, require_stop_token=False)  # plain captions end without one
    trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))
    return vlm_sft.finish(trainer, proof)


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
