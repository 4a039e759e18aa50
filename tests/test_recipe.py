import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import ModelConfig

from trl_ext import MethodTrainer, SPOTrainer, mix
from trl_ext.core.mixing import list_methods
from trl_ext.recipe import EMBEDDED, RecipeArguments, estimate, evaluate, main, parse
from trl_ext.tasks import POLICY_PATH, arithmetic


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGS = {name: mix(name).Config for name in list_methods()}
QUICK = ["--max_steps", "2", "--eval_prompts", "6", "--eval_samples", "2", "--disable_tqdm", "true"]
QUICK += [
    "--save_strategy",
    "no",
    "--dataset_size",
    "128",
    "--output_dir",
    "out",
    "--watch",
    "false",
    "--report_to",
    "none",
]
OTHER_MODEL = ["--model_name_or_path", "someone/model"]


def write_yaml(name, **content):
    Path(name).write_text(yaml.safe_dump(content))
    return str(name)


def results(folder="out"):
    return json.loads(Path(folder, "results.json").read_text())


def run_script(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


class TestPrecedence:
    def test_embedded_defaults(self):
        trainer, recipe, args, model = parse(argv=[])
        assert trainer is MethodTrainer
        assert recipe.methods == [] and recipe.dataset == "arithmetic"
        assert model.model_name_or_path == POLICY_PATH
        for name, value in EMBEDDED.items():
            assert name == "spo_offline_n" or getattr(args, name) == value
        assert parse(methods=["spo"], argv=[]).args.spo_offline_n == EMBEDDED["spo_offline_n"]
        assert args.output_dir == "runs/grpo"
        assert args.report_to == ["trackio"] and args.run_name == "grpo"

    def test_embedded_sizes_are_for_the_embedded_policy_only(self):
        args = parse(argv=OTHER_MODEL).args
        assert (args.max_completion_length, args.max_steps, args.learning_rate) == (512, -1, 1e-6)
        assert args.gradient_checkpointing
        assert parse(argv=["--model_name_or_path", POLICY_PATH]).args.max_completion_length == 8

    def test_cpu_settings_without_an_accelerator(self, monkeypatch):
        for there in (False, True):
            monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
            args = parse(argv=[*OTHER_MODEL, "--fp16", "false"] + ["--use_cpu", "true"] * there).args
            assert args.use_cpu and not args.bf16

    def test_every_layer_beats_the_one_below(self):
        recipe_defaults = {"learning_rate": 0.1, "epsilon": 0.5, "max_grad_norm": 0.3, "warmup_steps": 7, "beta": 0.2}
        config = write_yaml("c.yaml", temperature=0.7, epsilon=0.6, beta=0.3)
        argv = ["--config", config, "--paper", "--beta", "0.4", *OTHER_MODEL]
        args = parse(["clip_cov"], recipe_defaults, argv).args
        assert args.beta == 0.4  # command line > config file (0.3) > paper (0.0)
        assert args.epsilon == 0.6  # config file > paper (1.0)
        assert args.temperature == 0.7
        assert args.learning_rate == 5e-7  # paper > recipe (0.1)
        assert args.warmup_steps == 7 and args.max_grad_norm == 0.3  # recipe > class
        assert args.clip_cov_ratio == 2e-4
        args = parse(["clip_cov"], {"learning_rate": 0.1}, []).args
        assert args.learning_rate == 0.1  # recipe > embedded
        assert args.max_completion_length == EMBEDDED["max_completion_length"]

    def test_methods_from_the_file_and_the_command_line(self):
        config = write_yaml("c.yaml", methods=["clip_cov", "spo"], spo_offline_n=3)
        parsed = parse(["kl_cov"], None, [f"--config={config}"])
        assert parsed.Trainer is mix("spo", "clip_cov").Trainer
        assert parsed.recipe.methods == ["clip_cov", "spo"]
        assert parsed.args.spo_offline_n == 3
        assert parsed.args.output_dir == "runs/clip_cov+spo"
        assert parse(["kl_cov"], None, ["--config", config, "--methods", "spo"]).Trainer is SPOTrainer

    def test_a_blend(self):
        names, weights = ["--methods", "spo", "bnpo"], {"spo": 0.5, "bnpo": 1.5}
        blended = mix("spo", "bnpo", blend=weights).Trainer
        parsed = parse(argv=[*names, "--blend", "spo=0.5", "bnpo=1.5"])
        assert parsed.Trainer is blended and parsed.recipe.blend == ["spo=0.5", "bnpo=1.5"]
        assert parse(argv=[*names, "--config", write_yaml("c.yaml", blend=weights)]).Trainer is blended
        for blend, message in {
            "spo": "name=number for every estimator, got 'spo'",
            "spo=x": "got 'spo=x'",
            "spo=1": "'bnpo' is missing",
        }.items():
            with pytest.raises(ValueError, match=message):
                parse(argv=[*names, "--blend", blend])
        with pytest.raises(ValueError, match="no method is named"):
            parse(argv=["--blend", "spo=1"])

    def test_defaults_of_the_recipes_own_method_do_not_stop_another(self):
        assert parse(["spo"], {"spo_offline_n": 2}, ["--methods", "clip_cov"]).recipe.methods == ["clip_cov"]
        with pytest.raises(ValueError, match="unknown key 'spo_offline'"):
            parse(["spo"], {"spo_offline": 2}, [])

    def test_values_of_a_file_are_converted_as_on_the_command_line(self):
        config = write_yaml(
            "c.yaml", learning_rate="1e-4", max_steps="3", rewards="exact_match", task_config={"max_terms": 2}, beta=1
        )
        parsed = parse(argv=["--config", config])
        assert parsed.args.learning_rate == 1e-4 and parsed.args.max_steps == 3 and parsed.args.beta == 1.0
        assert parsed.recipe.rewards == ["exact_match"]
        assert parsed.recipe.task_config == {"max_terms": 2}
        assert parse(argv=["--task_config", '{"max_terms": 2}']).recipe.task_config == {"max_terms": 2}

    def test_the_batch_of_a_generation_comes_from_the_uppermost_layer(self):
        spg = {"steps_per_generation": 4}
        assert parse(["clip_cov"], spg, []).args.generation_batch_size == 4 * 64
        assert parse(["clip_cov"], spg, ["--generation_batch_size", "128"]).args.steps_per_generation == 2
        assert parse(["clip_cov"], spg, ["--paper", *OTHER_MODEL]).args.generation_batch_size == 2048
        args = parse(["clip_cov"], None, ["--paper", "--steps_per_generation", "2", *OTHER_MODEL]).args
        assert args.generation_batch_size == 2 * 4

    def test_env_of_a_file(self, monkeypatch):
        monkeypatch.delenv("TRL_EXT_TEST", raising=False)
        parse(argv=["--config", write_yaml("c.yaml", env={"TRL_EXT_TEST": 1})])
        assert os.environ.pop("TRL_EXT_TEST") == "1"

    def test_epochs_of_the_user_replace_the_embedded_steps(self):
        assert parse(argv=["--num_train_epochs", "2"]).args.max_steps == -1


class TestPaperSettings:
    @pytest.mark.parametrize("slug", CONFIGS)
    def test_every_key_arrives(self, slug):
        settings = yaml.safe_load((RECIPES / "configs" / f"{slug}.yaml").read_text())
        args = parse([slug], None, ["--paper", *OTHER_MODEL]).args
        assert type(args) is CONFIGS[slug]
        assert {name: getattr(args, name) for name in settings} == settings

    def test_every_file_is_a_methods(self):
        assert {path.stem for path in (RECIPES / "configs").iterdir()} == set(CONFIGS)

    def test_conflict(self):
        argv = ["--methods", "clip_cov", "spo", "--paper", *OTHER_MODEL]
        with pytest.raises(ValueError, match=r"`num_generations` is 8 .* clip_cov and 1 in those of spo: choose"):
            parse(argv=argv)

    def test_conflict_decided_by_command_line_and_file(self):
        config = write_yaml("c.yaml", generation_batch_size=64, per_device_train_batch_size=8, epsilon=1.0)
        argv = ["--methods", "clip_cov", "spo", "--paper", "--config", config, *OTHER_MODEL]
        argv += ["--num_generations", "1", "--epsilon_high", "2", "--gradient_accumulation_steps", "1"]
        argv += ["--loss_type", "dapo"]
        with pytest.raises(ValueError, match="`learning_rate` is 5e-07"):
            parse(argv=argv)
        args = parse(argv=[*argv, "--learning_rate", "1e-6"]).args
        assert (args.num_generations, args.generation_batch_size, args.epsilon_high) == (1, 64, 2.0)
        assert (args.delta, args.max_completion_length) == (10.0, 8192)  # from one file each

    def test_none_for_no_method(self):
        with pytest.raises(ValueError, match="no method is named"):
            parse(argv=["--paper"])

    def test_sizes_that_the_embedded_policy_cannot_hold(self):
        with pytest.raises(SystemExit, match=r"`max_completion_length` is 8192, .* give a real model"):
            main(["clip_cov"], argv=["--paper"])


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--learning_rat", "1"], "unknown option '--learning_rat': did you mean .*--learning_rate"),
            (["--learning", "1"], "unknown option '--learning'"),  # no abbreviations
            (["--spo_offline_n", "1"], "unknown option '--spo_offline_n'"),  # of a method that is not there
            (["surplus"], "unknown option 'surplus'"),
            (["--methods", "spoo"], "unknown method 'spoo'; known methods: .*spo"),
            (["--methods", "clip_cov", "kl_cov"], "ClipCovTrainer and KLCovTrainer contradict each other"),
            (["--methods", "spo", "spo"], "named twice"),
            (["--config", "missing.yaml"], "`config` 'missing.yaml' cannot be read"),
            (["--task_config", "{max_terms: 2}"], "`task_config` must be JSON"),
            (["--task_config", "[1]"], "`task_config` must be a mapping"),
            (["--eval_samples", "0"], "`eval_samples` must be at least 1, got 0"),
            (["--eval_prompts", "-1"], "`eval_prompts` must be at least 0, got -1"),
            (["--methods", "spo", "--spo_rho_min", "2"], "`spo_rho_min` must be between 0 and 1"),
            (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` must be .* no folder 'nowhere'"),
            (["--dataset", "missing.jsonl"], "no such file"),
            (["--rewards", "brevity"], "unknown reward"),
            (["--num_generations", "1"], "`num_generations` is 1"),
            (["--hub_strategy", "every_save"], "`hub_strategy` must be 'end', got 'every_save'"),
            (["--push_to_hub", "--max_steps", "1"], "`push_to_hub` is set, but the Hub does not know you"),
        ],
    )
    def test_error(self, argv, message):
        with pytest.raises(SystemExit, match=message):
            main(argv=argv)
        assert os.listdir() == []

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"learning_rat": 1}, "unknown key 'learning_rat' in c.yaml: did you mean learning_rate"),
            ({"config": "d.yaml"}, "unknown key 'config'"),
            ({"max_steps": 1.5}, "`max_steps` in c.yaml must be of type int, got 1.5"),
            ({"bf16": "perhaps"}, "`bf16` in c.yaml must be .* got 'perhaps'"),
            ({"rewards": [{"a": 1}], "save_strategy": "often"}, "`save_strategy` in c.yaml .*choose from no, steps"),
            ({"env": [1]}, "`env` in 'c.yaml' must be lines"),
        ],
    )
    def test_yaml(self, content, message):
        with pytest.raises(SystemExit, match=message):
            main(argv=["--config", write_yaml("c.yaml", **content)])

    @pytest.mark.parametrize("text", ["- 1", "a: [", "words"])
    def test_no_mapping(self, text):
        Path("c.yaml").write_text(text)
        with pytest.raises(SystemExit, match=r"`config` .*c\.yaml"):
            main(argv=["--config", "c.yaml"])

    def test_wrong_type_is_argparses_error_without_a_page_of_usage(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(argv=["--max_steps", "many"])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "invalid int value: 'many'" in message and len(message) < 200

    def test_file_without_reward(self):
        Path("d.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(20)))
        with pytest.raises(SystemExit, match=r"`rewards` is empty, and `dataset` 'd\.jsonl' has no reward"):
            main(argv=["--dataset", "d.jsonl"])


class TestEvaluation:
    def test_interval_is_over_prompts(self):
        mean, margin = estimate(torch.tensor([0.0, 1.0, 0.5, torch.nan, 0.5]))
        assert mean == pytest.approx(0.5)
        assert margin == pytest.approx(1.96 * math.sqrt((0.25 + 0.25) / 3) / 2)
        assert estimate(torch.tensor([0.3])).margin is None

    def test_weighted_sum_without_unscored(self):
        nan = torch.nan
        matrix = torch.tensor([[[1.0, 2.0], [nan, 2.0]], [[nan, nan], [0.0, 1.0]]])
        trainer = SimpleNamespace(
            score_prompts=lambda rows, n, dataset: matrix, reward_weights=torch.tensor([1.0, 0.5])
        )
        rewards = evaluate(trainer, [0, 1], 2)
        assert torch.equal(rewards.nan_to_num(-1), torch.tensor([[2.0, 1.0], [-1.0, 0.5]], dtype=torch.float64))


class TestRun:
    def test_folder_is_complete(self, capsys):
        options = ["--spo_offline_n", "1", "--logging_steps", "1", "--seed", "5", "--watch", "true"]
        main(["clip_cov", "spo"], argv=[*QUICK, *options])
        assert {"README.md", "results.json", "training_curve.png", "model.safetensors", "tokenizer.json"} <= set(
            os.listdir("out")
        )
        assert {"trl_ext_state.pt", "trl_ext_local_0.pt", "trl_ext_complete.json"} <= set(os.listdir("out"))
        assert {"report.html", "run.json", "token_entropy.json", "token_entropy.png", "entropy_law.png"} <= set(
            os.listdir("out")
        )
        report = Path("out/report.html").read_text()
        assert "held-out accuracy" in report and "Clip-Cov" in report and "Entropy by token" in report
        found = results()
        assert found["methods"] == ["clip_cov", "spo"]
        assert (found["model"], found["dataset"], found["rewards"]) == (
            "embedded policy",
            "arithmetic",
            ["exact_match"],
        )
        assert (found["seed"], found["processes"], found["start_step"], found["steps"]) == (5, 1, 0, 2)
        assert found["rollouts"] == 128 + 2 * 64  # the evaluation's are not counted
        assert (found["metric"], found["eval_prompts"], found["eval_samples"]) == ("accuracy", 6, 2)
        assert found["gain"]["mean"] == pytest.approx(found["after"]["mean"] - found["before"]["mean"])
        assert 0 <= found["before"]["mean"] <= 1 and found["before"]["margin"] >= 0
        assert found["minutes"] > 0
        assert [point["rollouts"] for point in found["curve"]] == [192, 256]
        assert all(point["entropy"] > 0 for point in found["curve"])
        card = Path("out/README.md").read_text()
        assert "@article{cui2025entropy" in card and "@article{xu2025single" in card
        assert "## Results" in card and "training_curve.png" in card and found["command"] in card
        assert "huggingface.co/None" not in card
        data = ModelCard.load("out/README.md").data
        assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
        assert {"trl", "trl-ext", "clip_cov", "spo"} <= set(data.tags) and data.library_name == "transformers"
        (result,) = data.eval_results
        assert (result.dataset_name, result.metric_type) == ("arithmetic", "accuracy")
        assert result.metric_value == found["after"]["mean"]
        for text in (card, Path("out/results.json").read_text()):
            assert POLICY_PATH not in text
        assert Path("out/training_curve.png").read_bytes()[:4] == b"\x89PNG"
        output = capsys.readouterr().out
        assert "256" in output and "'loss':" not in output

    def test_trackers_get_the_methods_metrics(self, monkeypatch):
        quick = QUICK[:-2]  # without --report_to
        main(["clip_cov"], argv=[*quick, "--num_iterations", "2", "--logging_steps", "1"])
        with open("report.yaml", "w") as file:
            file.write("report_to: [tensorboard]\n")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "board")
        main(["clip_cov"], argv=[*quick, "--num_iterations", "2", "--logging_steps", "1", "--config", "report.yaml"])
        last = json.loads(Path("out/results.json").read_text())["curve"][-1]["reward"]
        script = (  # in a process of its own: trackio reads its folder once
            "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
            "print(json.dumps([S.get_projects(), S.get_runs('trl-ext'), S.get_logs('trl-ext', 'out')]))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        projects, runs, logs = json.loads(done.stdout)
        assert projects == ["trl-ext"] and runs == ["out"]
        assert [log["train/reward"] for log in logs if "train/reward" in log] == [pytest.approx(last)]
        assert (
            sum("train/clip_cov/selected" in log for log in logs) == 2
        )  # the second step goes over the same rollouts
        board = EventAccumulator("board").Reload()
        assert [point.step for point in board.Scalars("train/clip_cov/selected")] == [1, 2]
        assert board.Scalars("train/reward")[-1].value == pytest.approx(last)

    def test_evaluation_does_not_change_training(self):
        main(argv=[*QUICK])
        main(argv=[*QUICK, "--eval_prompts", "0", "--output_dir", "without"])
        with_it, without = load_file("out/model.safetensors"), load_file("without/model.safetensors")
        assert all(torch.equal(with_it[name], without[name]) for name in with_it)
        assert results("without")["after"] is None and results("without")["eval_prompts"] == 0

    def test_local_file_with_own_reward(self):
        Path("short_rewards.py").write_text(
            "def brevity(completions, **kwargs):\n    return [-len(text) / 10 for text in completions]\n"
        )
        with open("sums.jsonl", "w") as file:
            for row in arithmetic().select(range(60)):
                file.write(json.dumps({"question": row["prompt"], "answer": row["answer"]}) + "\n")
        main(
            argv=[
                *QUICK,
                "--dataset",
                "sums.jsonl",
                "--prompt_column",
                "question",
                "--rewards",
                "short_rewards.brevity",
            ]
        )
        found = results()
        assert (found["metric"], found["rewards"]) == ("mean reward", ["brevity"])
        assert -0.8 <= found["before"]["mean"] < 0
        assert "%" not in Path("out/README.md").read_text().split("## Results")[1].split("held-out prompts")[0]

    def test_lora(self):
        main(argv=[*QUICK, "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"])
        assert Path("out/adapter_model.safetensors").is_file()

    def test_resumed_run_ends_where_the_uninterrupted_one_does(self):
        argv = ["--methods", "spo", *QUICK, "--spo_offline_n", "1", "--max_steps", "4", "--save_strategy", "steps"]
        argv += ["--save_steps", "2", "--logging_steps", "1"]
        main(argv=argv)
        main(argv=[*argv, "--output_dir", "again", "--resume_from_checkpoint", "out/checkpoint-2"])
        first, second = load_file("out/model.safetensors"), load_file("again/model.safetensors")
        assert all(torch.equal(first[name], second[name]) for name in first)
        found = results("again")
        assert (found["start_step"], found["steps"], found["rollouts"]) == (2, 4, results()["rollouts"])
        assert found["curve"] == results()["curve"]
        main(argv=[*argv, "--resume_from_checkpoint", "true", "--max_steps", "5"])
        assert results()["start_step"] == 4

    def test_token_is_not_written(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["recipes/train.py"])
        main(argv=[*QUICK, "--hub_token", "hf_secret", "--eval_prompts", "0"])
        assert "hf_secret" not in Path("out/README.md").read_text() + Path("out/results.json").read_text()
        assert results()["command"].startswith("python recipes/train.py --max_steps 2")


class TestUpload:
    @pytest.fixture
    def hub(self, monkeypatch):
        calls = []

        class Hub:
            broken = False

            def __init__(self, token=None):
                pass

            def whoami(self):
                return {"name": "someone"}

            def create_repo(self, repo, **kwargs):
                calls.append(repo)
                return SimpleNamespace(repo_id=f"someone/{repo}")

            def upload_folder(self, **kwargs):
                if Hub.broken:
                    raise ConnectionError("the line is dead")
                calls.append((kwargs["repo_id"], sorted(os.listdir(kwargs["folder_path"]))))

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        Hub.calls = calls
        return Hub

    def test_once_at_the_end_with_everything(self, hub):
        main(argv=[*QUICK, "--push_to_hub"])
        (repo, (repo_id, files)) = hub.calls
        assert (repo, repo_id) == ("out", "someone/out")
        assert {"README.md", "results.json", "training_curve.png", "model.safetensors"} <= set(files)

    def test_failure_leaves_a_complete_folder_and_the_command(self, hub):
        hub.broken = True
        with pytest.raises(SystemExit, match=r"the line is dead(.|\n)*hf upload me/it out \.") as stop:
            main(argv=[*QUICK, "--push_to_hub", "--hub_model_id", "me/it"])
        assert stop.value.code
        assert {"README.md", "results.json", "training_curve.png", "model.safetensors"} <= set(os.listdir("out"))


class TestScripts:
    @pytest.mark.parametrize(
        ("script", "options", "trainer"),
        [
            ("train.py", [], "MethodTrainer"),
            pytest.param("spo.py", ["--spo_offline_n", "1"], "SPOTrainer", marks=pytest.mark.slow),
            pytest.param("entropy_control.py", [], "ClipCovTrainer", marks=pytest.mark.slow),
            pytest.param("spend_rollouts.py", [], "KnapsackRLTrainer", marks=pytest.mark.slow),
            pytest.param("hints.py", [], "ScafGRPOTrainer", marks=pytest.mark.slow),
            pytest.param("distill.py", ["--kd_teacher", POLICY_PATH], "KDRLTrainer", marks=pytest.mark.slow),
            pytest.param("entropy_control.py", ["--methods", "kl_cov"], "KLCovTrainer", marks=pytest.mark.slow),
        ],
    )
    def test_runs(self, script, options, trainer):
        done = run_script(sys.executable, RECIPES / script, *QUICK, *options)
        assert results()["trainer"] == trainer and results()["steps"] == 2
        assert "strictly on-policy" not in done.stderr

    @pytest.mark.slow
    def test_two_processes(self):
        command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", RECIPES / "train.py", "--methods", "spo"]
        done = run_script(sys.executable, *command, *QUICK, "--spo_offline_n", "1")
        found = results()
        assert found["processes"] == 2
        assert found["rollouts"] == 128 + 2 * 128
        assert done.stdout.count("results.json are in") == 1
        assert {"trl_ext_local_0.pt", "trl_ext_local_1.pt"} <= set(os.listdir("out"))

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "processes"), [("one_cpu", 1), ("two_cpu_processes", 2)])
    def test_accelerate_launch(self, name, processes):
        config = RECIPES / "accelerate" / f"{name}.yaml"
        command = ["-m", "accelerate.commands.launch", "--config_file", config, RECIPES / "train.py"]
        run_script(sys.executable, *command, *QUICK)
        assert results()["processes"] == processes
        assert results()["command"].split()[:4] == ["python", "-m", "accelerate.commands.launch", "--config_file"]

    def test_help_shows_the_options_of_the_methods(self):
        done = run_script(sys.executable, RECIPES / "spo.py", "--help")
        assert "--spo_offline_n" in done.stdout and "--eval_samples" in done.stdout and "--lora_r" in done.stdout
        assert len(done.stdout.splitlines()[0]) < 100

    @pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").iterdir()), ids=lambda path: path.stem)
    def test_accelerate_configs_load(self, path):
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(path))
        assert config.use_cpu == ("cpu" in path.stem)
        assert config.num_processes == {"one_cpu": 1, "two_cpu_processes": 2, "one_gpu": 1}.get(path.stem, 8)


def test_options_do_not_collide():
    import dataclasses

    for config in CONFIGS.values():
        names = [f.name for kind in (RecipeArguments, config, ModelConfig) for f in dataclasses.fields(kind) if f.init]
        assert len(names) == len(set(names))
