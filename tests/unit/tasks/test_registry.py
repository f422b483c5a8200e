"""The registry against the real MLflow on sqlite, with a real adapter on a tiny real backbone."""

import io
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml

from fedmentor_core.adapters.backbone import embedded_backbone_folder, load_backbone
from fedmentor_core.adapters.lora import adapter_state, attach, resolved_targets, save_adapter_folder
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.config import AdapterConfig, BackboneConfig
from fedmentor_core.errors import BackboneError, ConfigError, GateError
from fedmentor_core.records import GateSummary
from flows.generate import generate_command, read_questions
from tasks import registered_files, registry, registry_client
from tasks.registered_files import load_registered
from tasks.registration_records import BackboneReference, DomainPromise, Registration
from tasks.registry import champion, decide, promote, register_and_decide, register_challenger, rollback
from tasks.registry_client import RegistryError
from tasks.tracking import mlflow_client

PASSED = GateSummary(passed=True, reasons=())
FAILED = GateSummary(passed=False, reasons=("FAIL: label_f1 [overall] 0.1000 >= 0.5000",))
NAME = "fedmentor-adapter"
ROW = {"post": "I have not slept for days and my exams are near.", "question": "Is the poster stressed?"}


def make_backbone(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(list(ROW.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_adapter(folder: Path, backbone: BackboneConfig, seed: int) -> str:
    """An adapter whose B is not zero, so that it changes the answers; returns the backbone's digest."""
    import torch

    loaded = load_backbone(backbone)
    config = AdapterConfig(rank=4)
    model = attach(loaded, config, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {name: torch.randn_like(t) for name, t in adapter_state(model, trainable_only=False).items()}
    save_adapter_folder(folder, state, config, resolved_targets(model))
    return loaded.sha256


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    make_backbone(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_backbone) -> list[Path]:
    folders = [tmp_path_factory.mktemp("adapters") / f"adapter{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        write_adapter(folder, BackboneConfig(name=str(tiny_backbone), device="cpu"), seed)
    return folders


@pytest.fixture
def register(tracker, study, tiny_backbone, adapters, lineage):
    """Registers the n-th study with the n-th adapter."""
    sha256 = load_backbone(BackboneConfig(name=str(tiny_backbone), device="cpu")).sha256
    reference = BackboneReference(name=str(tiny_backbone), sha256=sha256, max_length=128, max_new_tokens=6)

    def registration(number: int, *, private: bool = True, audit_required: bool = False) -> Registration:
        run_id = tracker.start_study_run(study.config, f"run-{number}")
        return Registration(
            name=NAME,
            study_run_id=f"run-{number}",
            mlflow_run_id=run_id,
            config_sha256="c" * 64,
            private=private,
            promises=DomainPromise.of(study.summary()),
            backbone=reference,
            mechanism=Mechanism.of(study.config, sha256),
            lineage=lineage,
            audit_required=audit_required,
        )

    def run(number: int, gate: GateSummary = PASSED, *, private: bool = True, audit_required=False, **options):
        request = registration(number, private=private, audit_required=audit_required)
        return register_and_decide(tracker.tracking_uri, request, adapters[number], gate, **options)

    run.registration = registration
    return run


@pytest.fixture
def versions(tracker):
    """Tags by version, as they are now."""

    def read() -> dict[str, dict[str, str]]:
        found = mlflow_client(tracker.tracking_uri).search_model_versions(f"name = '{NAME}'")
        return {str(one.version): dict(one.tags) for one in found}

    return read


@pytest.fixture
def global_uri(tracking_uri, monkeypatch):
    """For ``mlflow.pyfunc.load_model`` as a user calls it; FedMentor itself never needs it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)  # which MLflow sets too, and would leave to later tests
    mlflow.set_tracking_uri(tracking_uri)
    yield tracking_uri
    mlflow.set_tracking_uri(None)


def test_passing_adapter_becomes_champion_with_all_tags(register, versions, tracking_uri):
    model = register(0)
    assert (model.name, model.version, model.aliases) == (NAME, "1", ("challenger", "champion"))
    assert champion(tracking_uri, NAME) == model
    tags = versions()["1"]
    assert tags["gate"] == "passed"
    assert tags["previous_champion"] == "none"
    assert tags["fedmentor.run_id"] == "run-0"
    assert tags["fedmentor.private"] == "true"
    assert tags["fedmentor.epsilon_spent.sleep"] == "2.0"
    assert tags["fedmentor.delta.sleep"] == "1e-05"
    assert tags["fedmentor.config_sha256"] == "c" * 64


def test_failing_adapter_stays_challenger(register, versions, tracking_uri):
    assert register(0, FAILED).aliases == ("challenger",)
    assert champion(tracking_uri, NAME) is None
    assert versions()["1"]["gate"] == "failed"
    assert "label_f1" in versions()["1"]["gate_reasons"]
    with pytest.raises(GateError, match="gate is 'failed'"):
        promote(tracking_uri, NAME, "1", reason="please")
    assert champion(tracking_uri, NAME) is None


def test_not_private_is_held_unless_allowed(register, versions, tracking_uri):
    assert register(0, private=False).aliases == ("challenger",)
    assert versions()["1"]["fedmentor.held"] == "the study is not private"
    with pytest.raises(GateError, match="not private"):
        promote(tracking_uri, NAME, "1", reason="please")
    assert "champion" in register(1, private=False, allow_not_private=True).aliases


def test_undecided_version_cannot_be_promoted(register, adapters, tracking_uri):
    pending = register_challenger(tracking_uri, register.registration(0), adapters[0])
    assert pending.aliases == ("challenger",)
    with pytest.raises(GateError, match="pending"):
        promote(tracking_uri, NAME, pending.version, reason="early")


def test_user_loads_and_runs_the_champion(register, global_uri):
    register(0)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    frame = pd.DataFrame([ROW, ROW | {"post": "A quiet day."}])
    answers = model.predict(frame, params={"max_new_tokens": 4})
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    assert model.predict(frame, params={"max_new_tokens": 4}) == answers
    assert model.predict([ROW], params={"max_new_tokens": 4}) == answers[:1]
    assert len(model.predict([{"prompt": "A post"}])) == 1
    assert model.metadata.get_input_schema().input_names() == ["post", "question", "prompt"]
    assert model.metadata.run_id is not None


def test_adapter_is_applied_and_a_long_post_is_cut(register, tracking_uri):
    first, second = register(0), register(1)
    rows = [ROW, ROW | {"post": "word " * 2000}]
    answers = [
        load_registered(tracking_uri, f"models:/{NAME}/{one.version}").answers(rows, max_new_tokens=12)
        for one in (first, second)
    ]
    assert answers[0] != answers[1]


def test_model_folder_holds_adapter_manifests_and_code_only(register, tracking_uri, tiny_backbone, tmp_path):
    register(0)
    uri = mlflow_client(tracking_uri).get_model_version_download_uri(NAME, "1")
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "model")))
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "serve_model.py",
        "artifacts/adapter/adapter_config.json",
        "artifacts/adapter/adapter_model.safetensors",
        "artifacts/backbone.json",
    }
    weights = (tiny_backbone / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in files.values()) < weights
    manifest = json.loads(files["artifacts/backbone.json"].read_text())
    assert set(manifest) == set(BackboneReference.model_fields)
    text = files["MLmodel"].read_text()
    saved = yaml.safe_load(text)
    assert {one["uri"] for one in saved["flavors"]["python_function"]["artifacts"].values()} == {
        "artifacts/adapter",
        "artifacts/backbone.json",
    }
    assert "cloudpickle" not in text
    assert "fedmentor==" in files["requirements.txt"].read_text()


def test_another_backbone_is_refused(register, tracking_uri, tmp_path):
    register(0)
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    make_backbone(other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="sha256"):
        load_registered(tracking_uri, f"models:/{NAME}@champion", backbone=str(other))


def test_moved_backbone_is_found_by_override(register, tracking_uri, tiny_backbone, tmp_path):
    import shutil

    register(0)
    moved = shutil.copytree(tiny_backbone, tmp_path / "moved")
    loaded = load_registered(tracking_uri, f"models:/{NAME}@champion", backbone=str(moved), device="cpu")
    assert loaded.version == "1"


def test_second_champion_then_rollback_and_no_further(register, versions, tracking_uri):
    register(0)
    assert register(1).aliases == ("challenger", "champion")
    assert versions()["2"]["previous_champion"] == "1"
    back = rollback(tracking_uri, NAME, reason="answers got worse")
    assert (back.version, back.aliases) == ("1", ("champion",))
    assert champion(tracking_uri, NAME).version == "1"
    assert versions()["2"]["fedmentor.rolled_back_reason"] == "answers got worse"
    assert versions()["1"]["fedmentor.restored_from"] == "2"
    with pytest.raises(ConfigError, match="first champion"):
        rollback(tracking_uri, NAME, reason="again")
    assert promote(tracking_uri, NAME, "2", reason="it was the server").version == "2"
    assert versions()["2"]["previous_champion"] == "1"


def test_flows_promote_and_roll_back(register, tracking_uri):
    from flows.promote import promote as promote_flow
    from flows.rollback import rollback as rollback_flow

    register(0)
    register(1)
    assert rollback_flow.fn("bad answers", NAME, tracking_uri).version == "1"
    assert promote_flow.fn("2", "good after all", NAME, tracking_uri).version == "2"
    assert (promote_flow.name, rollback_flow.name) == ("promote", "rollback")


def test_resume_registers_once_and_does_not_undo_a_rollback(register, versions, tracking_uri):
    register(0)
    register(1)
    assert register(1).version == "2"
    rollback(tracking_uri, NAME, reason="bad")
    assert register(1).aliases == ("challenger",)
    assert champion(tracking_uri, NAME).version == "1"
    assert set(versions()) == {"1", "2"}


def test_resuming_an_old_study_does_not_take_back_its_aliases(register, tracking_uri):
    register(0)
    register(1)
    assert register(0).aliases == ()
    assert champion(tracking_uri, NAME).version == "2"


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (registered_files, "_save_model"),
        (registry, "ensure_registered_model"),
        (registry, "set_tags"),
        (registry, "verify_champion"),
        (registry, "summary_of"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_crash_at_any_step_then_resume(register, versions, tracking_uri, monkeypatch, module, step):
    register(0)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, crash)
        with pytest.raises(KeyboardInterrupt):
            register(1)
    assert champion(tracking_uri, NAME).version in ("1", "2")
    model = register(1)
    assert model.aliases == ("challenger", "champion")
    assert set(versions()) == {"1", "2"}
    assert versions()["2"]["previous_champion"] == "1"
    assert rollback(tracking_uri, NAME, reason="test").version == "1"


def test_alias_moved_by_another_process_is_noticed(register, tracking_uri, monkeypatch):
    register(0)
    real = registry_client.aliases_of
    calls = []

    def stale(client, name):
        calls.append(name)
        return real(client, name) | {"champion": "1"}

    monkeypatch.setattr(registry, "aliases_of", stale)
    monkeypatch.setattr(registry_client, "aliases_of", stale)
    with pytest.raises(RegistryError, match="should be version 2"):
        register(1)


def test_same_study_with_another_adapter_is_another_version(register, adapters, tracking_uri):
    register(0)
    request = register.registration(0)
    assert register_challenger(tracking_uri, request, adapters[1]).version == "2"


def test_registration_needs_no_active_run_and_leaves_the_global_uri(register, tracking_uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    register(0)
    load_registered(tracking_uri, f"models:/{NAME}@champion")
    assert mlflow.get_tracking_uri() == before != tracking_uri
    assert mlflow.active_run() is None
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow", "ledgers"}


def test_folder_that_is_no_adapter(register, tracking_uri, tmp_path):
    request = register.registration(0)
    with pytest.raises(ConfigError, match="not found"):
        register_challenger(tracking_uri, request, tmp_path / "nowhere")
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        register_challenger(tracking_uri, request, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin"):
        register_challenger(tracking_uri, request, folder)


def test_unknown_names_are_said_with_what_there_is(register, tracking_uri, tmp_path):
    register(0, FAILED)
    with pytest.raises(ConfigError, match=f"no registered model 'nope'; the registry has: {NAME}"):
        champion(tracking_uri, "nope")
    with pytest.raises(ConfigError, match="no version '7'; it has: 1"):
        promote(tracking_uri, NAME, "7", reason="x")
    with pytest.raises(ConfigError, match="no alias 'champion'; it has: challenger"):
        load_registered(tracking_uri, f"models:/{NAME}@champion")
    with pytest.raises(ConfigError, match="models:/NAME@champion"):
        load_registered(tracking_uri, NAME)
    with pytest.raises(ConfigError, match="no champion"):
        rollback(tracking_uri, NAME, reason="x")
    with pytest.raises(ConfigError, match="no MLflow database"):
        champion(f"sqlite:///{tmp_path}/typo.db", NAME)
    with pytest.raises(RegistryError, match="record the verdict"):
        decide(tracking_uri, NAME, "9", PASSED, judged_sha256="")


def test_generate_command_prints_text_lines_and_json(register, tracking_uri, tmp_path):
    register(0)
    uri = f"models:/{NAME}@champion"
    out = io.StringIO()
    one = generate_command(uri, tracking_uri, **ROW, stream=out)
    assert out.getvalue().strip() == (one.answers[0] or "(empty answer)").strip()
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps({"prompt": "A post"}) + "\n", encoding="utf-8")
    out = io.StringIO()
    generate_command(uri, tracking_uri, input_file=path, as_json=True, stream=out)
    printed = json.loads(out.getvalue())
    assert (printed["model"], printed["version"], len(printed["answers"])) == (NAME, "1", 2)
    assert printed["answers"][0] == one.answers[0]
    with pytest.raises(ConfigError, match="max_new_tokens must be from 1 to 127"):
        generate_command(uri, tracking_uri, **ROW, max_new_tokens=500)
    path.write_text(json.dumps({"prompt": "long " * 900}), encoding="utf-8")
    with pytest.raises(ConfigError, match="row 1: the prompt has"):
        generate_command(uri, tracking_uri, input_file=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no line"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"post": "secret words"}', "line 1: needs .* missing: question"),
        (b'{"post": "a", "question": "b"}\nsecret words', "line 2: not valid JSON"),
        (b'["secret words"]', "missing: post, question"),
    ],
)
def test_bad_input_file_is_refused_without_quoting_it(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_questions(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"post": "a"}, {"post": " ", "question": "b"}])
def test_nothing_to_ask(given):
    with pytest.raises(ConfigError, match="--post"):
        generate_command("models:/x@champion", "sqlite:////nowhere.db", **given)


@pytest.mark.skipif(not embedded_backbone_folder().is_dir(), reason="the embedded backbone is not built yet")
def test_embedded_backbone_end_to_end(tracker, study, lineage, tmp_path):
    sha256 = write_adapter(tmp_path / "adapter", BackboneConfig(device="cpu"), seed=0)
    request = Registration(
        name=NAME,
        study_run_id="run-1",
        mlflow_run_id=tracker.start_study_run(study.config, "run-1"),
        config_sha256="c" * 64,
        private=True,
        promises=DomainPromise.of(study.summary()),
        backbone=BackboneReference(name="embedded", sha256=sha256, max_length=192, max_new_tokens=8),
        mechanism=Mechanism.of(study.config, sha256),
        lineage=lineage,
    )
    register_and_decide(tracker.tracking_uri, request, tmp_path / "adapter", PASSED)
    loaded = load_registered(tracker.tracking_uri, f"models:/{NAME}@champion")
    assert len(loaded.answers([ROW])) == 1


@pytest.mark.slow
def test_a_consumer_never_gets_a_half_written_model(register, versions, tracking_uri, monkeypatch):
    """It loads the champion in a loop while versions are registered, cut short, promoted and rolled back."""
    register(0)
    script = Path(__file__).with_name("consumer.py")
    with subprocess.Popen(
        [sys.executable, str(script), tracking_uri, f"models:/{NAME}@champion"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as consumer:  # fmt: skip
        seen = [json.loads(consumer.stdout.readline())]

        def crash(*_):
            raise KeyboardInterrupt

        def cut_short(number: int) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(registered_files, "_save_model", crash)
                with pytest.raises(KeyboardInterrupt):
                    register(number)

        for change in (
            lambda: cut_short(1),
            lambda: register(1),
            lambda: register(2, FAILED),
            lambda: rollback(tracking_uri, NAME, reason="bad"),
            lambda: promote(tracking_uri, NAME, "2", reason="good after all"),
        ):
            change()
            seen += [json.loads(consumer.stdout.readline()) for _ in range(2)]
        rest, errors = consumer.communicate("stop\n", timeout=120)
        seen += [json.loads(line) for line in rest.splitlines()]
    assert consumer.returncode == 0, errors
    adapters = {version: tags["fedmentor.adapter_sha256"] for version, tags in versions().items()}
    answers = {version: {one["answer"] for one in seen if one["version"] == version} for version in ("1", "2")}
    assert all(one["adapter"] == adapters[one["version"]] for one in seen), "whole, and its own version's"
    assert {one["version"] for one in seen} == {"1", "2"}, "never the version that failed its gate"
    assert all(len(found) == 1 for found in answers.values()), "one version always answers alike"
    assert seen[-1]["version"] == "2"
