"""The rows and the models of the side-by-side runs, all drawn from a seed: nothing is downloaded.

Rows, as in LLaVA's instruction mix: one in ten has no picture; of the others 85% have one, the rest two or three.
1 to 8 exchanges, each further one with a chance of 55% (LLaVA's conversations are mostly short). Words of a question:
6 to 20; of an answer: log-normal with a median of 18 (40 where there is no picture), at most 250, some 7% of the
answers over 60. Pictures: JPEG of quality 85, the sizes of COCO and of screens, sides whole or shorter by a sixteenth.
Short rows have one or two exchanges, and answers with a median of 12 words, at most 40.
"""

from __future__ import annotations

import io
import random
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "people", "who", "were"),
    *("walking", "along", "river", "with", "dogs", "while", "red", "bus", "stopped", "near", "old", "station"),
    *("where", "two", "children", "held", "blue", "balloons", "under", "tall", "green", "trees", "it", "shows"),
    *("some", "white", "plates", "of", "food"),
]
SIZES = (*((640, 480),) * 4, *((480, 640),) * 2, (500, 375), (336, 336), (1024, 768), (1280, 720))
TEXT, NUMBER = Value("string"), Value("int64")
FEATURES = Features(
    {
        "messages": List({"content": List({"index": NUMBER, "text": TEXT, "type": TEXT}), "role": TEXT}),
        "images": List(ImageFeature()),
    }
)  # the columns of HuggingFaceH4/llava-instruct-mix-vsft


def rows(count: int, *, seed: int = 0, short: bool = False) -> Dataset:
    draw = random.Random(seed)
    exchanges_at_most, longest, median = (2, 40, 2.5) if short else (8, 250, None)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    def part(kind: str, text: str | None = None, index: int | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "type": kind}

    def row() -> dict[str, Any]:
        images = 0 if draw.random() < 0.1 else draw.choices([1, 2, 3], [85, 10, 5])[0]
        exchanges = 1
        while exchanges < exchanges_at_most and draw.random() < 0.55:
            exchanges += 1
        messages = []
        for n in range(exchanges):
            pictures = [part("image", index=i) for i in range(images)] if n == 0 else []
            question = [*pictures, part("text", f"What about {words(draw.randint(6, 20))}?")]
            length = min(longest, max(1, round(draw.lognormvariate(median or (2.9 if images else 3.7), 0.8))))
            answer = [part("text", f"{words(length)}.".capitalize())]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [{"bytes": picture(draw), "path": None} for _ in range(images)]}

    return Dataset.from_list([row() for _ in range(count)], features=FEATURES)


def picture(draw: random.Random) -> bytes:
    width, height = (side * draw.choice((15, 16)) // 16 for side in draw.choice(SIZES))
    noise = Image.frombytes("RGB", (width // 8, height // 8), draw.randbytes(3 * (width // 8) * (height // 8)))
    data = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BILINEAR).save(data, "JPEG", quality=85)
    return data.getvalue()


def llava(kind: str) -> tuple[Any, Any]:
    """A random LLaVA-1.5 of 4.2 or 0.9 million parameters, `"vision-heavy"` or `"LM-heavy"`, and its processor.

    Pictures are of 112 pixels and 64 tokens. The share of the tower in the forward pass is about that of
    SmolVLM2-2.2B, two thirds, or that of LLaVA-1.5-7B, a twentieth.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlm_sft.tools import tiny

    small, processor = tiny.build("llava15", image_size=112, patch_size=14, corpus=[" ".join(WORDS)])
    tower, language = {"vision-heavy": ((192, 9), (96, 2)), "LM-heavy": ((64, 3), (160, 2))}[kind]

    def shape(width: int, layers: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
        }

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=112, patch_size=14, **shape(*tower)),
        text_config=LlamaConfig(
            vocab_size=1152, max_position_embeddings=8192, num_key_value_heads=language[0] // 32, **shape(*language)
        ),
        image_token_index=small.config.image_token_index,
        image_seq_length=64,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config = small.generation_config
    return model, processor
