"""Ask a model about an image: in the terminal, or on a page in the browser, the base's answer beside the tuned one's.

Takes a model, a checkpoint or an adapter, whose base answers too, by the same weights. For a full model `--base_model`
names the one it was trained from. The page is for this machine alone, unless --host 0.0.0.0 opens it; edit `page`.

    python recipes/chat.py --image photo.jpg --question "What is this?"                  # one answer
    python recipes/chat.py --model_name_or_path outputs/llava15_sft --image photo.jpg    # a chat, in the terminal
    python recipes/chat.py --web                                    # a page; needs Gradio: pip install -e ".[web]"
"""

import contextlib
import html
import importlib.util
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vlm_sft
from accelerate import PartialState
from peft import PeftModel
from vlm_sft.chat.images import open_image, to_rgb
from vlm_sft.data.rows import recorded_prompt


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(default="outputs/quickstart", metadata={"help": "Folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    base_model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model before training."})
    image: str | None = field(default=None, metadata={"help": "The image to ask about."})
    question: str | None = field(default=None, metadata={"help": "Ask this alone, instead of what is typed."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    web: bool = field(default=False, metadata={"help": "A page in the browser instead of the terminal."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address of the page; 0.0.0.0 is every network."})
    port: int = field(default=7860, metadata={"help": "Port of the page."})


@dataclass
class Speaker:
    name: str
    model: Any
    template: vlm_sft.ChatTemplate
    options: dict[str, Any]  # of `generate`
    system: list[dict[str, Any]]  # of training
    use_adapter: bool = True
    messages: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, messages: list[dict[str, Any]], images: list[Any]) -> str:
        rows = [{"messages": self.system + messages, "images": images}]
        try:
            with contextlib.nullcontext() if self.use_adapter else self.model.disable_adapter():
                return vlm_sft.generate(self.model, self.template, rows, progress=False, **self.options)[0]
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # each processor refuses in its own way
            if images:
                raise
            raise ValueError(f"This model took no question without an image ({error}); give it one.") from error


def load(args: RecipeArguments) -> list[Speaker]:
    """The base, where there is one, and the tuned model."""
    device, options = PartialState().device, {"revision": args.model_revision}
    template = vlm_sft.ChatTemplate(vlm_sft.load_processor(args.model_name_or_path, **options))
    model = vlm_sft.load_model(args.model_name_or_path, base_model=args.base_model, **options).to(device)
    prompt = recorded_prompt(Path(args.model_name_or_path))
    asked = {"max_new_tokens": args.max_new_tokens}, [turn("system", prompt)] if prompt else []
    tuned = Speaker("tuned", model, template, *asked)
    if isinstance(model, PeftModel):
        return [Speaker("base", model, template, *asked, use_adapter=False), tuned]
    if args.base_model:
        base = vlm_sft.load_model(args.base_model).to(device)
        template = vlm_sft.ChatTemplate(vlm_sft.load_processor(args.base_model))
        return [Speaker("base", base, template, *asked), tuned]
    return [tuned]


def read_image(path: str) -> Any:
    return to_rgb(open_image(Path(path).name, folder=Path(path).parent, allow_outside=True))


def turn(role: str, text: str, *, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def chat(speakers: list[Speaker], images: list[Any], question: str | None) -> None:
    """Prints the answers to one question, or to all that are typed until an empty line, each with what came before."""
    for asked in [question] if question else iter(lambda: input("\nQuestion (empty ends): ").strip(), ""):
        for speaker in speakers:
            speaker.messages.append(turn("user", asked, images=0 if speaker.messages else len(images)))
            answer = speaker.answer(speaker.messages, images)
            speaker.messages.append(turn("assistant", answer))
            print(f"{speaker.name}: {answer}", flush=True)


def page(speakers: list[Speaker], title: str) -> Any:
    import gradio as gr

    def reply(path: str | None, question: str) -> list[str]:
        try:
            if not question.strip():
                raise ValueError("There is no question; write one.")
            images = [read_image(path)] if path else []
            return [speaker.answer([turn("user", question, images=len(images))], images) for speaker in speakers]
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from error

    with gr.Blocks(title=title, analytics_enabled=False) as blocks, gr.Row():
        shown = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=400)
        shown.preprocess = lambda upload: upload and upload.path  # Gradio's error for a broken one says nothing
        with gr.Column():
            question = gr.Textbox(label="Question", autofocus=True)
            ask = gr.Button("Ask", variant="primary")
            with gr.Row():
                answers = [gr.Textbox(label=speaker.name.capitalize(), lines=8) for speaker in speakers]
        gr.on([ask.click, question.submit], reply, [shown, question], answers)
    return blocks


def main(args: RecipeArguments) -> None:
    if not args.web:
        images = [read_image(args.image)] if args.image else []
        with contextlib.suppress(EOFError):
            chat(load(args), images, args.question)
        return
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs Gradio: pip install -e ".[web]", or leave --web away and ask here.')
    try:
        socket.create_server((args.host, args.port)).close()  # before minutes go into loading
    except OSError as error:
        raise ValueError(f"{args.host}:{args.port}: {error.strerror}. Try --port {args.port + 1}.") from error
    blocks = page(load(args), f"Ask {Path(args.model_name_or_path).name}")
    print(f"The page: http://{args.host}:{args.port}", flush=True)
    blocks.launch(server_name=args.host, server_port=args.port, share=False, quiet=True, footer_links=[])


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments)
