"""Every file in accelerate_configs/ loads, says when to use it, and starts as many processes as it claims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPECTED = {
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 2),
    "fsdp2": (DistributedType.FSDP, 2),
    "fsdp2_qlora": (DistributedType.FSDP, 2),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 2),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 2),
    "multi_node": (DistributedType.MULTI_GPU, 16),
    "cpu_2proc": (DistributedType.MULTI_GPU, 2),
    "cpu_2proc_fsdp2": (DistributedType.FSDP, 2),
}


def test_the_files_the_readers_are_promised_are_there():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_in_accelerate_and_explains_itself(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.num_processes >= 1
    assert path.read_text().startswith("# "), "say on top when to use the file and what it was tried on"


@pytest.mark.parametrize("name", EXPECTED)
def test_type_and_number_of_processes_are_true_to_the_name(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == EXPECTED[name]
    assert config.use_cpu == name.startswith("cpu")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_misspelt_key_is_refused(path, tmp_path):
    settings = yaml.safe_load(path.read_text())
    settings["num_proceses"] = settings.pop("num_processes")
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(copy))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_of_a_section_is_misspelt(path):
    """accelerate takes any key there, and leaves those it does not know unread."""
    settings = yaml.safe_load(path.read_text())
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(settings.get(section, {})) <= known


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_qlora", "cpu_2proc_fsdp2"])
def test_sharded_runs_are_of_version_2_and_save_whole_models(name):
    section = load_config_from_file(str(FOLDER / f"{name}.yaml")).fsdp_config
    assert section["fsdp_version"] == 2
    assert section["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_the_stage_of_the_name(stage):
    section = load_config_from_file(str(FOLDER / f"deepspeed_zero{stage}.yaml")).deepspeed_config
    assert section["zero_stage"] == stage


@pytest.mark.sweep
def test_cpu_2proc_starts_two_processes_that_know_of_each_other(tmp_path):
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from transformers import TrainingArguments\n"
        "args = TrainingArguments(output_dir=sys.argv[1], use_cpu=True)\n"
        "Path(sys.argv[1], f'rank{args.process_index}').write_text(str(args.world_size))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    subprocess.run(
        [*launch, "--config_file", str(FOLDER / "cpu_2proc.yaml"), str(script), str(tmp_path)],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert {path.name: path.read_text() for path in tmp_path.glob("rank*")} == {"rank0": "2", "rank1": "2"}
