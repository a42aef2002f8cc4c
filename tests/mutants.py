"""Source mutations that the tests must notice: `make mutants`, or `python tests/mutants.py [WORD ...]` for some.

Each changes one place of a copy of the project, in which the tests named beside it then run. One that they do not
notice is a survivor: write the test. A text to change that is not there exactly once is an error: fix the list.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT_S = 600


class Mutant(NamedTuple):
    """`old` in `file` (below vlm_sft/) becomes `new`; one of `tests` must fail: files below tests/, after a colon words
    of the names of tests in it, as in `chat/test_collators.py:trim|blank`."""

    name: str
    file: str
    old: str
    new: str
    tests: str


# One a line, so that two of them are compared at a glance.
# fmt: off
MUTANTS = [
    # The proof
    Mutant("an optimizer of another rate passes", "checks.py", "if not math.isclose(meant, runs, rel_tol=1e-6):", "if False:", "test_proof.py:exchanged_after"),
    Mutant("the images of audited rows stay", "chat/audit.py", "if id(row) not in kept:", "if False:", "test_proof.py:images_of_audited"),
    Mutant("a row that fails in another process is passed over", "chat/audit.py", "looks += (each or look(batch) for each, batch", "looks += (each for each, batch", "chat/test_audit.py:in_another_process"),
    Mutant("an audit draws random numbers", "common.py", "        restore_rng(before)", "        pass", "chat/test_audit.py:other_processes"),
    Mutant("dtypes are not held", "proof.py", "f\"{name} in {weight.dtype}\"", "name", "test_proof.py:exchanged_after"),
    Mutant("a schedule may end anywhere", "checks.py", "if highest > 1.001 or (highest < 0.999 and ", "if False and (", "test_proof.py:cannot_be_meant"),
    Mutant("a warm-up that no schedule takes", "checks.py", "if warmup > 1 and shares[0](0) == highest and", "if False and", "test_proof.py:cannot_be_meant"),
    Mutant("the worst loss is the best", "checks.py", "elif name in less and bool(", "elif name in answers and bool(", "test_proof.py:cannot_be_meant"),
    Mutant("training rows are held out", "checks.py", "any(each is rows for each in those)", "False", "test_proof.py:not_held_out"),
    Mutant("the launcher's precision", "checks.py", "!= asked and not trainer.is_deepspeed_enabled", "!= runs", "test_proof.py:of_the_launcher"),
    Mutant("adapters that are merged", "checks.py", "if any(module.merged for", "if any(False for", "test_proof.py:merged"),
    Mutant("a base changed in memory", "checks.py", "if changed := _changed_config(trainer.model):", "if changed := []:", "test_proof.py:changed_in_memory"),
    Mutant("held-out rows may change at a resume", "proof.py", "[each.content for each in held_out] or None", "None", "training/test_resume.py:held_out"),
    Mutant("a rewritten text passes", "chat/places.py", "core in (None, plain[start[0] : end[0]])", "True", "chat/test_collators.py:rewrites"),
    # Labels and masks
    Mutant("the attention mask from the pad id", "chat/collator.py", "\"attention_mask\": torch.ones_like(row.labels)", "\"attention_mask\": (row.tokens[\"input_ids\"] != self.processor.tokenizer.pad_token_id).long()", "chat/test_collators.py:padding_that"),
    Mutant("padding is trained", "chat/collator.py", "\"labels\": IGNORE_INDEX}", "\"labels\": 0}", "chat/test_collators.py:padding_changes"),
    Mutant("the blank row is trained", "chat/collator.py", "torch.full_like(blank.labels, IGNORE_INDEX)", "blank.labels", "chat/test_collators.py:blank_one"),
    Mutant("the blank row is decided by the first row", "chat/collator.py", "any(row.conversation.images for row in rows)", "any(row.conversation.images for row in rows[:1])", "chat/test_collators.py:blank_one"),
    Mutant("the blank row comes always", "chat/collator.py", "if due and not any(", "if due or not any(", "chat/test_collators.py:blank_one"),
    Mutant("rows are numbered from 0", "chat/collator.py", "torch.tensor([row.number for row in rows])", "torch.arange(len(rows))", "chat/test_collators.py:rows_are_named"),
    Mutant("image tokens are trained", "chat/collator.py", "learned & ~image", "learned", "chat/test_collators.py:everything_but"),
    Mutant("the ids that images bring are forgotten", "chat/collator.py", "image |= torch.isin(input_ids, self._image_ids)", "pass", "chat/test_collators.py:everything_but"),
    Mutant("a tokenizer changed in place is another's", "chat/collator.py", "or self._written[1] != state", "or False", "chat/test_collators.py:written_out_again"),
    Mutant("all rows pass for known", "data/check_rows.py", "all(records.recall(self.known, look.key) for", "all(True for", "data/test_one_pass.py:without_workers"),
    Mutant("the user's words are trained", "chat/collator.py", "torch.ones_like(image) if self.settings.train_on == \"all\"", "torch.ones_like(image) if True", "chat/test_collators.py:which_answers"),
    Mutant("train: false has no effect", "chat/collator.py", "messages[n].get(\"train\", True)", "True", "chat/test_collators.py:which_answers"),
    Mutant("last_assistant trains the first", "chat/collator.py", "answers[-1:] if", "answers[:1] if", "chat/test_collators.py:which_answers"),
    Mutant("text that nothing reports passes", "chat/collator.py", "<= int(offsets.max()) <= len(text)", "<= int(offsets.max())", "chat/test_collators.py:without_reporting"),
    Mutant("tokens across the prompt's end are not cut", "chat/collator.py", "row = self._cut_tokens(row, cuts)", "pass", "chat/test_collators.py:prompt_is_what"),
    Mutant("a span's last token is left out", "chat/expansions.py", "(start < span_end) & (end > span_start)", "(end < span_end) & (end > span_start)", "chat/test_collators.py:which_answers"),
    Mutant("a span takes the token before it", "chat/expansions.py", "(start < span_end) & (end > span_start)", "(start < span_end) & (end >= span_start)", "chat/test_collators.py:which_answers"),
    Mutant("spans are not moved by images", "chat/places.py", "sum(len(words) - (end - start) for start, end, words in edits if end <= position)", "0", "chat/test_collators.py:one_exchange"),
    Mutant("BOS is never added", "chat/template.py", "return not text.startswith(", "return False and not text.startswith(", "chat/test_collators.py:original_format"),
    Mutant("BOS is always added", "chat/template.py", "return not text.startswith(", "return True or not text.startswith(", "chat/test_collators.py:prompt_is_what|original_format"),
    Mutant("the first row of a join trains its first token", "chat/collator.py", "row.labels.new_tensor([IGNORE_INDEX]), row.labels[1:]", "row.labels", "chat/test_packing.py:first_token"),
    Mutant("positions run on in a join", "chat/collator.py", "torch.cat([torch.arange(len(row)) for row in rows])", "torch.arange(sum(map(len, rows)))", "chat/test_packing.py:first_token"),
    Mutant("a row without trained tokens passes", "chat/collator.py", "if (row.labels == IGNORE_INDEX).all():", "if False:", "chat/test_collators.py:which_answers"),
    # Lengths
    Mutant("trimmed from the wrong end", "chat/collator.py", "in reversed(split_turns(row.conversation)[:-1])", "in split_turns(row.conversation)[:-1]", "chat/test_collators.py:trim"),
    Mutant("a trim cuts an image", "chat/collator.py", "int(image.max()) + 1 if len(image) else 0", "0", "chat/test_collators.py:trim"),
    Mutant("a trim leaves nothing trained", "chat/collator.py", "int(trained.min()) + 1 if len(trained) else len(row)", "0", "chat/test_collators.py:truncation"),
    Mutant("one token too long passes", "chat/collator.py", "if limit is None or all(len(row) <= limit", "if limit is None or all(len(row) <= limit + 1", "chat/test_collators.py:truncation"),
    Mutant("exchanges that just fit are left out", "chat/collator.py", "            if len(row) <= limit:\n                return row", "            if len(row) < limit:\n                return row", "chat/test_collators.py:trim"),
    Mutant("truncation is always allowed", "chat/collator.py", "if self.settings.truncation == \"error\":", "if False:", "chat/test_collators.py:truncation"),
    Mutant("no multiple", "chat/collator.py", "self.settings.pad_to_multiple_of or 1", "1", "chat/test_collators.py:multiple"),
    # Spans and stop tokens
    Mutant("the first stop token after an answer instead of the last", "chat/template.py", "written[-1].end()", "written[0].end()", "chat/test_collators.py:ends_with_the_last"),
    Mutant("its name, too", "chat/template.py", "stop = written[-1].group()", "stop = written[0].group()", "chat/test_collators.py:ends_with_the_last"),
    Mutant("nothing is inserted", "chat/template.py", "if stop and not written:", "if False:", "chat/test_collators.py:original_format"),
    Mutant("repeated marks", "chat/places.py", "len(start) <= 1 and len(end) == 1", "True", "chat/test_collators.py:repeats_a_text"),
    Mutant("a lost text passes", "chat/template.py", "if not missing:", "if True:", "chat/test_collators.py:drops_text"),
    Mutant("an answer rendered differently passes", "chat/template.py", "elif number in trained:", "elif False:", "chat/test_collators.py:thinking"),
    Mutant("marks that change the text pass", "chat/places.py", "if MARK.sub(\"\", rendered) != plain:", "if False:", "chat/test_collators.py:random_conv"),
    Mutant("texts stand where they stood before, whatever is written", "chat/places.py", "if edited(earlier, edits) == plain:", "if True:", "chat/test_collators.py:of_the_same_shape"),
    Mutant("blank texts are remembered", "chat/places.py", "all(text.strip() for text in texts) and ", "", "chat/test_collators.py:random_conv|blank"),
    Mutant("copies of an image token lie in one place", "chat/expansions.py", " + nth * width[place]", "", "chat/test_collators.py:read_once"),
    Mutant("words after a run are not moved", "chat/expansions.py", "(np.cumsum(more) - more)[place]", "0", "chat/test_collators.py:read_once"),
    Mutant("an image token of other words counts as a run", "chat/expansions.py", "if at.sum() != len(runs):", "if False:", "chat/test_collators.py:read_once"),
    Mutant("a run takes the white space beside it", "chat/template.py", " if not (t.lstrip or t.rstrip or t.single_word or t.normalized)", "", "chat/test_collators.py:read_once"),
    Mutant("generation stops at its config alone", "chat/template.py", "return sorted(ids | {", "return sorted({", "chat/test_collators.py:ends_with_the_last"),
    # Conversations
    Mutant("the place after an explicit index", "chat/messages.py", "max(used, default=-1) + 1", "len(used)", "chat/test_messages.py"),
    Mutant("images come after the question", "chat/messages.py", "[*({\"type\": \"image\"} for _ in pool), *parts]", "[*parts, *({\"type\": \"image\"} for _ in pool)]", "chat/test_messages.py"),
    Mutant("an image too many passes", "chat/messages.py", "if len(used) < len(pool):", "if False:", "chat/test_messages.py"),
    Mutant("an image of an assistant passes", "chat/messages.py", "if role == \"assistant\":", "if False:", "chat/test_messages.py"),
    Mutant("two questions in a row pass", "chat/messages.py", "if role not in _FOLLOWS[before]:", "if False:", "chat/test_messages.py"),
    Mutant("reserved tokens pass", "chat/messages.py", "if found := sorted({*reserved.findall(", "if found := () and sorted({*reserved.findall(", "chat/test_collators.py:reserved"),
    Mutant("pieces share their images", "chat/messages.py", "images[: count_images(messages[:end])]", "images", "chat/test_collators.py:trim"),
    Mutant("a lone surrogate passes", "chat/messages.py", "text.encode()", "pass", "chat/test_messages.py"),
    # Images
    Mutant("EXIF is ignored", "chat/images.py", "return value if 1 <= value <= 8 else 1", "return 1", "chat/test_images.py"),
    Mutant("transparent is black", "chat/images.py", "\"white\"", "\"black\"", "chat/test_images.py"),
    Mutant("a file outside the folder opens", "chat/images.py", "if not (allow_outside or", "if not (True or", "chat/test_images.py data/test_datasets.py"),
    # Rows
    Mutant("an image of 1 x 50 pixels passes", "data/records.py", "if min(image.size) == 1:", "if max(image.size) == 1:", "data/test_check_rows.py:every_fault"),
    Mutant("the longest allowed image is refused", "data/records.py", "> MAX_ASPECT * min(", ">= MAX_ASPECT * min(", "data/test_check_rows.py:every_fault"),
    Mutant("a file's size is not part of its row", "data/records.py", "f\"{about} {found.st_size}\"", "f\"{about}\"", "data/test_one_pass.py:told_by_name"),
    Mutant("a file's time is not part of its key", "data/records.py", "{place!r} {found.st_mtime_ns}", "{place!r}", "data/test_one_pass.py:told_by_name"),
    Mutant("texts are not part of a row", "data/records.py", "digest(json.dumps(messages).encode(), *(what", "digest(*(what", "training/test_resume.py:file_changed"),
    Mutant("images are not part of a row", "data/records.py", "encode(), *(what for what, _, _ in told))", "encode())", "training/test_resume.py:file_changed"),
    Mutant("blank answers pass", "data/records.py", "if text.strip() or not message", "if True or not message", "data/test_check_rows.py:every_fault|may_be_blank"),
    Mutant("control characters pass", "data/records.py", "if control := _CONTROL.search(text):", "if control := None:", "data/test_check_rows.py:control_character"),
    Mutant("repeated rows pass", "data/check_rows.py", "np.flatnonzero(~again)", "np.flatnonzero(again & False)", "data/test_check_rows.py:repeats_an_earlier"),
    Mutant("dropped rows stay", "data/check_rows.py", "report.keep if drop and report.faults", "report.keep if False", "data/test_check_rows.py:dropping_is"),
    Mutant("any share may be dropped", "data/check_rows.py", "max(1, max_bad_fraction * rows) if drop", "rows if drop", "data/test_check_rows.py:dropping_is"),
    Mutant("too long rows pass the check", "data/check_rows.py", "record.length > settings.max_length", "False", "data/test_check_rows.py:processor_finds"),
    Mutant("split == eval split", "data/datasets.py", "for key in sources if key != split", "for key in sources", "data/test_datasets.py:is_not_held_out"),
    Mutant("held-out rows are trained on", "data/datasets.py", "if n not in test]", "]", "data/test_datasets.py:split_is_made|is_not_held_out"),
    Mutant("the seed draws nothing", "data/datasets.py", "random.Random(seed)", "random.Random(0)", "data/test_datasets.py:split_is_made"),
    Mutant("more than a fifth is held out", "data/datasets.py", "round(fraction * len(rows))", "len(rows) - 1", "data/test_datasets.py:as_many_are_held_out"),
    # Packs
    Mutant("a pack overflows", "chat/packing.py", "(lengths[n], -1)", "(lengths[n] - 1, -1)", "chat/test_packing.py:one_pack"),
    Mutant("one get_rope_index for a pack", "chat/packing.py", "(positions[0] == 0).nonzero().flatten().tolist()", "[0]", "chat/test_packing.py:numbered_from_0"),
    Mutant("mixed conversations pass", "chat/packing.py", "if difference > max(1e-4, 4 * rounding):", "if False:", "chat/test_packing.py:mix_conversations"),
    # What trains
    Mutant("weights that should not train pass", "models/adapters.py", "trained - full,", "set(),", "models/test_adapters.py"),
    Mutant("weights that should train pass", "models/adapters.py", "full - trained,", "set(),", "models/test_adapters.py"),
    Mutant("layers without adapters pass", "models/adapters.py", "asked - held.keys()", "set()", "models/test_adapters.py"),
    Mutant("a 16-bit weight trains", "models/freezing.py", "parameter.data.to(torch.float32)", "parameter.data", "models/test_freezing.py"),
    Mutant("a tower with adapters is in evaluation mode", "models/freezing.py", "mode = mode and any(weight.requires_grad for weight in tower.parameters())", "mode = False", "models/test_freezing.py"),
    Mutant("modes are not restored", "common.py", "module.training = training", "pass", "chat/test_packing.py:losses_and_gradients"),
    # The gate
    Mutant("another collator passes", "proof.py", "\"trainer.data_collator\": collator,", "\"trainer.data_collator\": None,", "test_proof.py:exchanged"),
    Mutant("other rows pass", "proof.py", "\"trainer.train_dataset\": (train, getattr(train, \"_fingerprint\", None)),", "\"trainer.train_dataset\": None,", "test_proof.py:exchanged"),
    Mutant("another optimizer passes", "checks.py", "if forgotten or others:", "if False:", "test_proof.py:optimizer|exchanged"),
    Mutant("a finished run writes its record again", "proof.py", "if self.recorded is not None:\n            proof", "if False:\n            proof", "training/test_resume.py:finished"),
    Mutant("a pickle with paths stays", "proof.py", "(output / TRAINING_ARGS_NAME).unlink(missing_ok=True)", "pass", "training/test_resume.py:finished"),
    Mutant("what the optimizer does not read passes", "training/config.py", "not re.search(optims, optim)", "False", "test_proof.py:does_not_read"),
    Mutant("a misspelled keyword of the template passes", "chat/template.py", "check_template_kwargs(processor, self.kwargs or {})", "pass", "chat/test_collators.py:does_not_read"),
    Mutant("text counts as true", "chat/collator.py", "{bool: (True, False), bool | None: (True, False, None)}", "{}", "chat/test_collators.py:settings_are_checked"),
    Mutant("asked without the system prompt of training", "data/rows.py", "    return trained\n", "    return given\n", "test_evaluate_recipe.py:system_prompt"),
    # Order
    Mutant("data_seed is ignored", "training/batches.py", "return args.seed if args.data_seed is None else args.data_seed", "return args.seed", "training/test_batches.py:own_order"),
    Mutant("steps from short rows to long ones", "training/batches.py", "drawn = torch.randperm(count, generator=self.generator).tolist()", "drawn = [*range(count)]", "training/test_batches.py:no_order_of_length"),
    Mutant("small datasets are sorted by quarters", "training/batches.py", "max(1, -(-count // _POOL))", "4", "training/test_batches.py:no_order_of_length"),
    Mutant("the longest step comes anywhere", "training/batches.py", "        drawn.sort(key=lambda step: longest not in steps[step])\n", "", "training/test_batches.py:no_order_of_length"),
    Mutant("every epoch in the same order", "training/batches.py", "torch.Generator().manual_seed(_seed(args) + epoch)", "torch.Generator().manual_seed(_seed(args))", "training/test_batches.py:own_order"),
    Mutant("workers draw from training's state", "upstream.py", "getattr(loader, \"base_dataloader\", loader).generator", "loader.unused", "training/test_resume.py:exact"),
    Mutant("an evaluation changes the random state", "training/callbacks.py", "restore_rng(self._state)", "pass", "training/test_callbacks.py"),
    Mutant("NaN steps are taken", "training/callbacks.py", "if not any_rank(bad_loss or", "if True or not any_rank(bad_loss or", "training/test_callbacks.py"),
    # Saves and resumes
    Mutant("checkpoints sorted as text", "training/checkpoints.py", "sorted((int(step), path)", "sorted((step, path)", "training/test_checkpoints.py:order_of_their_steps"),
    Mutant("evaluation on SIGTERM", "training/checkpoints.py", "control.should_evaluate = False\n        self", "pass\n        self", "training/test_checkpoints.py:sigterm"),
    Mutant("no save on SIGTERM", "training/checkpoints.py", "self._terminated = control.should_save = True", "self._terminated = True", "training/test_checkpoints.py:sigterm"),
    Mutant("no fsync", "models/manifest.py", "os.fsync(descriptor)", "pass", "training/test_checkpoints.py:every_file_is"),
    Mutant("sizes alone", "models/manifest.py", "_digest_of(folder / name) != files[name][\"xxh3\"]", "False", "training/test_checkpoints.py:damaged_checkpoint_is"),
    Mutant("a manifest is believed", "models/manifest.py", "if content.pop(\"xxh3\", None) != _own_digest(content):", "if content.pop(\"xxh3\", None) is None:", "training/test_checkpoints.py:flipped_bit"),
    Mutant("a manifest is written in place", "models/manifest.py", "folder / f\"{MANIFEST}.tmp\"", "folder / MANIFEST", "training/test_checkpoints.py:every_file_is"),
    Mutant("a finished run is overwritten", "training/checkpoints.py", "if complete := [", "if False and [", "training/test_checkpoints.py:is_not_overwritten"),
    Mutant("two runs share a folder", "training/checkpoints.py", "lock_file(self._locked)", "pass", "training/test_checkpoints.py:share_a_folder"),
    Mutant("settings are not compared", "training/checkpoints.py", "        if found:", "        if False:", "training/test_checkpoints.py:another_run"),
    Mutant("the base is not compared", "training/checkpoints.py", "for line in lines[:6]]", "for line in lines[:0]]", "training/test_resume.py:file_changed"),
    Mutant("the Hub's names in a checkpoint", "upstream.py", "save_original_format=not is_checkpoint", "save_original_format=True", "training/test_checkpoints.py:keep_the_names"),
    Mutant("a full disk is noticed too late", "training/checkpoints.py", ".free) < needed", ".free) < 0", "training/test_checkpoints.py:without_room"),
    # Bases and merges
    Mutant("another base passes", "models/fingerprints.py", "its == was or", "True or", "models/test_fingerprints.py"),
    Mutant("the first half of a weight alone", "models/fingerprints.py", "torch.linspace(0, tensor.numel() - 1,", "torch.linspace(0, tensor.numel() // 2,", "models/test_fingerprints.py"),
    Mutant("merge by copy", "tools/merging.py", "os.rename(folder, out)", "__import__('shutil').copytree(folder, out)", "tools/test_merging.py:whole_or_not"),
    Mutant("a merge that is off passes", "tools/merging.py", "if not error <= tolerance:", "if False:", "tools/test_merging.py:does_nothing"),
    Mutant("an erased update passes", "tools/merging.py", "if _distance(found.prompt, bare.prompt) <", "if False and _distance(found.prompt, bare.prompt) <", "tools/test_merging.py:rounding_erases"),
    Mutant("an adapter without effect is merged", "tools/merging.py", "if not _distance(expected.prompt, bare.prompt):", "if False:", "tools/test_merging.py:without_effect"),
    Mutant("keys left over pass", "models/loading.py", "if missing or left:", "if False:", "tools/test_merging.py:unknown_key"),
    # Hostile files
    Mutant("TRL's head scores all positions", "proof.py", "    score_labelled_positions(not trainer.args.torch_compile)\n", "", "test_proof.py:loss_scores_trained"),
    Mutant("files added to a checkpoint are no fault", "models/manifest.py", "sorted(there - files.keys())", "()", "test_attacks.py:pickle_in_a_checkpoint"),
    Mutant("an index names files anywhere", "models/loading.py", "sorted({*shards} - {*os.listdir(folder)})", "[]", "test_attacks.py:index_names"),
    Mutant("weights of any format are read", "models/loading.py", "use_safetensors=True", "use_safetensors=None", "test_attacks.py:only_weights"),
    Mutant("a damaged adapter config ends a resume", "models/fingerprints.py", "file.write_bytes(file.read_bytes().replace(was.encode(), told.encode()))", "file.write_text(file.read_text(\"utf-8\").replace(was, told), encoding=\"utf-8\")", "training/test_resume.py:flipped_bit_in_any_file_of_a_run"),
    Mutant("deep JSON ends the reading of a file", "data/files.py", "except (ValueError, RecursionError) as error:  # perhaps", "except ValueError as error:  # perhaps", "test_attacks.py:deep_array"),
]
# fmt: on


def copied(folder: Path) -> Path:
    skipped = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder / "project", ignore=skipped))


def is_noticed(mutant: Mutant, project: Path) -> bool:
    """Whether the tests fail, or do not end, with the mutant in the place of the source."""
    file = project / "vlm_sft" / mutant.file
    source = file.read_text("utf-8")
    file.write_text(source.replace(mutant.old, mutant.new), "utf-8")
    started, child = time.monotonic(), os.fork()  # what the tests import is there already
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(project)
        os.environ["PYTHONPATH"] = str(project)
        sys.path[:0] = [str(project), str(project / "tests")]
        quiet = os.open(project.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        import pytest

        files, _, names = mutant.tests.partition(":")
        words = [f"tests/{file}" for file in files.split()] + (["-k", " or ".join(names.split("|"))] if names else [])
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not faults and not sweep", *words])))
    try:
        while time.monotonic() - started < LIMIT_S:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                if code not in (0, 1, 2):  # such as a file of tests that is not there
                    raise SystemExit(
                        f"{mutant.name}: pytest ended with {code}\n{(project.parent / 'log').read_text()[-2000:]}"
                    )
                return code != 0
            time.sleep(0.1)
        os.killpg(child, 9)
        os.waitpid(child, 0)
        return True
    finally:
        file.write_text(source, "utf-8")


def faults_of(mutants: list[Mutant]) -> list[str]:
    """Names of mutants whose text is not there, or not once."""
    counts = {m.name: (ROOT / "vlm_sft" / m.file).read_text("utf-8").count(m.old) for m in mutants}
    return [f"{name}: its text is there {count} times" for name, count in counts.items() if count != 1]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(re.search(word, f"{m.name} {m.file}") for word in words)]
    if faults := faults_of(MUTANTS):
        raise SystemExit("\n".join(faults))
    sys.path.insert(0, str(ROOT / "tests"))
    # First this, which sets what the libraries read when they are imported.
    _kept = [importlib.import_module(name) for name in ("conftest", "trl", "peft", "datasets", "bitsandbytes")]
    del sys.modules["conftest"]  # the tests import their own
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        project = copied(Path(folder))
        for number, mutant in enumerate(chosen, 1):
            started, noticed = time.monotonic(), is_noticed(mutant, project)
            survivors += [] if noticed else [mutant]
            said = "noticed" if noticed else "SURVIVES"
            print(
                f"{number:3}/{len(chosen)} {said:<9} {time.monotonic() - started:5.0f} s  {mutant.file}: {mutant.name}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are noticed")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
