"""Publishing: the real Hub client, in processes of its own, against a Hub on localhost that can be told to fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, read_folder, run_client
from finished_run import make_run
from huggingface_hub import ModelCard
from small_model import REMOVE

from ln_removal.errors import UserError
from ln_removal.export.hub import HubTarget, named_target, stale_files

TOKEN = "hf_PlantedTokenThatMustNotShowAnywhere"
READ_ONLY, STRANGER, FINE, NARROW = "hf_readonly", "hf_stranger", "hf_fine", "hf_narrow"
WRONG = "hf_nobody"
SUBJECTS = (TOKEN, READ_ONLY, STRANGER, FINE, NARROW, WRONG)

# Publish the runs named by the cases and print what came of it, a line of JSON each. Waits are noted, not waited for.
PRELUDE = """
import json, os, sys, time
from pathlib import Path
import huggingface_hub.utils._http as client_http
from ln_removal.errors import UserError
from ln_removal.export import hub
from ln_removal.pipelines import publishing
from ln_removal.export.hub import HubTarget, check_target

waited = []
class Clock:
    sleep = staticmethod(waited.append)
    monotonic, time = time.monotonic, time.time
client_http.time = hub.time = Clock

def case(run, repo, token, check=True, **options):
    os.environ["HF_TOKEN"] = token
    target = HubTarget(repo, **options)
    waited.clear()
    result = {"stage": "check"}
    try:
        if check:
            check_target(target)
        result["stage"] = "publish"
        done = publishing.publish_run(Path(run), target)
        result.update(stage="done", url=done.url, commit=done.commit, is_new=done.is_new)
    except UserError as error:
        result["error"] = str(error)
    print(json.dumps({**result, "waited": list(waited)}), flush=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves, without the training: a random LN-free model in both forms, scores and a plot."""
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_account(TOKEN, "alice", orgs={"lab": "write", "club": "read"})
        hub.add_account(READ_ONLY, "alice", role="read")
        hub.add_account(STRANGER, "mallory")
        hub.add_account(FINE, "alice", role="fineGrained", scopes=[("alice", ["repo.content.read", "repo.write"])])
        hub.add_account(NARROW, "alice", role="fineGrained", scopes=[("alice", ["repo.content.read"])])
        yield hub


def publish(hub: FakeHub, home: Path, *cases: str, **environment: str) -> list[dict[str, Any]]:
    """Run the cases in one process; what it prints must not hold a token."""
    done = run_client(PRELUDE + "\n".join(cases), hub.endpoint, home, **environment)
    assert done.returncode == 0, done.stderr
    for token in SUBJECTS:
        assert token not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def files_of(hub: FakeHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.repos["models", repo].files(revision)
    assert found is not None
    return found[1]


def case(run: Path, repo: str, token: str = TOKEN, **options: Any) -> str:
    named = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"case({str(run)!r}, {repo!r}, {token!r}{named})"


# ------------------------------------------------------------------------------------------------------ what goes up


def test_a_run_is_published_in_one_commit(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    first, again, private = publish(
        hub,
        tmp_path,
        case(finished, "alice/gpt2-free", tag="v1.0"),
        case(finished, "alice/gpt2-free", tag="v1.0"),
        case(finished, "lab/hidden", private=True),
    )
    assert first["stage"] == "done" and first["is_new"], first
    assert [commit["repo"] for commit in hub.uploads.commits] == ["alice/gpt2-free", "lab/hidden"]
    files = files_of(hub, "alice/gpt2-free")
    model, stock = read_folder(finished / "model"), read_folder(finished / "stock")
    expected = {path: data for path, data in model.items() if path != "README.md"}
    expected |= {f"stock/{path}": data for path, data in stock.items()}
    expected["plots/loss.png"] = (finished / "plots" / "loss.png").read_bytes()
    expected["results.json"] = (finished / "results.json").read_bytes()
    assert {path: files[path] for path in expected} == expected
    assert set(files) - set(expected) == {"README.md", "report.html", ".gitattributes"}
    assert hub.repos["models", "alice/gpt2-free"].tags == {"v1.0": first["commit"]}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "openai-community/gpt2" and card.data.license == "mit"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("cross_entropy", 3.2)]
    assert 'AutoModelForCausalLM.from_pretrained("alice/gpt2-free")' in card.text
    assert 'GPT2LMHeadModel.from_pretrained("alice/gpt2-free", subfolder="stock")' in card.text
    assert "THIS-DIRECTORY" not in card.text
    # The same again is no mistake and makes no commit.
    assert again["stage"] == "done" and not again["is_new"] and again["commit"] == first["commit"]
    assert private["stage"] == "done"
    assert hub.repos["models", "lab/hidden"].private and not hub.repos["models", "alice/gpt2-free"].private


def test_what_was_published_loads_with_the_same_logits(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    publish(hub, tmp_path, case(finished, "alice/gpt2-free", tag="v1"))
    loaded = run_client(
        f"""
import json, torch, ln_removal
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
tokens = torch.arange(20).reshape(1, 20) * 7 % 320
local = AutoModelForCausalLM.from_pretrained({str(finished / "model")!r}).eval()(tokens).logits
there = AutoModelForCausalLM.from_pretrained("alice/gpt2-free").eval()(tokens).logits
tagged = AutoModelForCausalLM.from_pretrained("alice/gpt2-free", revision="v1").eval()(tokens).logits
stock = GPT2LMHeadModel.from_pretrained("alice/gpt2-free", subfolder="stock").eval()(tokens).logits
ids = AutoTokenizer.from_pretrained("alice/gpt2-free")("def f(x):").input_ids
error = ((stock - local).abs().max() / local.abs().max()).item()
print(json.dumps([torch.equal(local, there), torch.equal(local, tagged), error, ids]))
""",
        hub.endpoint,
        tmp_path,
    )
    assert loaded.returncode == 0, loaded.stderr
    same, pinned, error, ids = json.loads(loaded.stdout)
    assert same and pinned and error < 1e-4 and len(ids) > 2


def test_other_content_is_a_new_commit_without_leftovers(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", seed=1)
    before = {
        "README.md": b"old",
        "notes.txt": b"the user's own",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "plots/old.png": b"old",
        "adapters/model.safetensors": b"the user's own",
        "onnx/model.onnx": b"the user's own",
        "tokenizers.md": b"the user's own",
    }
    of_another_model = {
        *("adapter_config.json", "adapter_model.bin", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"),
        *("pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "hf_quant_config.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja"),
    }
    hub.add("models", "alice/there", before | dict.fromkeys(of_another_model, b"{}"))
    first, second, taken = publish(
        hub,
        tmp_path,
        case(finished, "alice/there", tag="v1"),
        case(other, "alice/there"),
        case(finished, "alice/there", tag="v1"),
    )
    assert first["is_new"] and second["is_new"] and first["commit"] != second["commit"]
    files = files_of(hub, "alice/there")
    assert files["model.safetensors"] == (other / "model" / "model.safetensors").read_bytes()
    for kept in ("notes.txt", "onnx/model.onnx", "adapters/model.safetensors", "tokenizers.md"):
        assert files[kept] == b"the user's own"
    assert not of_another_model & set(files), "they would be loaded in place of the model or with it"
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "plots/old.png"} & set(files)
    assert files_of(hub, "alice/there", "v1")["model.safetensors"] != files["model.safetensors"]
    assert taken["stage"] == "check" and "has the tag v1 already" in taken["error"]


def test_a_tokenizer_stays_where_the_published_model_has_none() -> None:
    there = {"model.safetensors", "tokenizer.json", "vocab.json", "adapter_config.json", "README.md"}
    assert stale_files(there, {"model.safetensors": b""}) == ["adapter_config.json"]
    assert stale_files(there, {"model.safetensors": b"", "tokenizer.json": b""}) == [
        "adapter_config.json",
        "vocab.json",
    ]


# ---------------------------------------------------------------------------------------------------- what is refused


def test_refusals_come_at_the_check_and_write_nothing(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    hub.add("models", "alice/public", {"README.md": b"old"})
    hub.add("models", "lab/there", {"README.md": b"old"})
    refused = [
        ("token", case(finished, "alice/x", WRONG)),
        ("token", case(finished, "alice/x", TOKEN + chr(7))),  # no header can hold it, and no message may
        ("alice/x", case(finished, "alice/x", READ_ONLY)),
        ("alice/y", case(finished, "alice/y", NARROW)),
        ("mallory", case(finished, "alice/x", STRANGER)),
        ("alice/public", case(finished, "alice/public", STRANGER)),
        ("club", case(finished, "club/x")),
        ("--private", case(finished, "lab/there", private=True)),
        ("127.0.0.1", case(finished, "alice/x", "")),
    ]
    for (part, _), result in zip(refused, publish(hub, tmp_path, *(each for _, each in refused)), strict=True):
        assert result["stage"] == "check" and part in result["error"], result
        assert "\n" not in result["error"]
    assert hub.uploads.commits == [] and set(hub.repos) == {("models", "alice/public"), ("models", "lab/there")}


def test_what_is_allowed_passes_the_check(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    hub.add("models", "lab/there", {"README.md": b"old"})
    done = publish(hub, tmp_path, case(finished, "alice/x", FINE), case(finished, "lab/there"))
    assert [result["stage"] for result in done] == ["done", "done"], done


def test_a_right_lost_after_the_check_says_how_to_publish_later(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    (lost,) = publish(hub, tmp_path, case(finished, "alice/x", STRANGER, check=False, private=True, tag="v1"))
    assert lost["stage"] == "publish" and lost["waited"] == []
    assert lost["error"].endswith(
        f"everything is in {finished}, publish it with: ln-export {finished} --push-to-hub alice/x --private --tag v1"
    )
    assert ("models", "alice/x") not in hub.repos


@pytest.mark.parametrize(
    "repo",
    ["", "gpt2", "/gpt2", "alice/", "a/b/c", "alice/my model", "alice/-x", "alice/a--b", "alice/x.git", "al ice/x"],
)
def test_malformed_repositories(repo: str) -> None:
    with pytest.raises(UserError, match="USER/REPO"):
        named_target(repo)


def test_options_without_a_target_are_not_ignored() -> None:
    assert named_target(None) is None
    assert named_target("alice/gpt2_LN.free-1", private=True, tag="v1.0") == HubTarget(
        "alice/gpt2_LN.free-1", True, "v1.0"
    )
    with pytest.raises(UserError, match=r"--private.*--push-to-hub"):
        named_target(None, private=True)
    with pytest.raises(UserError, match="--tag"):
        named_target(None, tag="v1")
    with pytest.raises(UserError, match="a tag"):
        named_target("alice/x", tag="a tag")


def test_a_gitignore_that_swallows_the_weights_is_told(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    hub.ignored = {"model.safetensors"}
    (result,) = publish(hub, tmp_path, case(finished, "alice/x"))
    assert "leaves out model.safetensors" in result["error"] and ".gitignore" in result["error"]


# ------------------------------------------------------------------------------------------------- broken connections


def test_what_is_cut_once_is_tried_again_and_nothing_is_made_twice(
    hub: FakeHub, finished: Path, tmp_path: Path
) -> None:
    cut = ("/storage/alice/a/", "/api/models/alice/b/commit/", "alice/c.git/info/lfs/objects/verify")
    hub.cuts |= dict.fromkeys(cut, 1)
    hub.lost_answers["/api/models/alice/d/commit/"] = 1
    repos = [f"alice/{name}" for name in "abcd"]
    results = publish(hub, tmp_path, *(case(finished, repo, tag="v1") for repo in repos))
    assert [result["stage"] for result in results] == ["done"] * 4, results
    assert not any(hub.cuts.values())
    assert [commit["repo"] for commit in hub.uploads.commits] == repos
    for repo, result in zip(repos, results, strict=True):
        weights = (finished / "model" / "model.safetensors").read_bytes()
        assert files_of(hub, repo)["model.safetensors"] == weights
        assert hub.repos["models", repo].tags == {"v1": result["commit"]}
    sent = [path for method, path, _ in hub.requests if method == "PUT" and "/alice/b/" in path]
    assert len(sent) == len(set(sent)) >= 3, "two weights files, the plot, the report where it is large"


def test_a_connection_always_cut_ends_in_one_line_and_half_of_nothing(
    hub: FakeHub, finished: Path, tmp_path: Path
) -> None:
    before = {"README.md": b"old", "model.safetensors": b"old weights"}
    hub.add("models", "alice/there", before)
    hub.cuts |= {"/storage/alice/there/": 10_000, "/api/models/alice/new/commit/": 10_000}
    uploads, commit = publish(hub, tmp_path, case(finished, "alice/there"), case(finished, "alice/new"))
    for failed in (uploads, commit):
        assert failed["stage"] == "publish" and "after 4 attempts" in failed["error"], failed
        assert "cannot reach 127.0.0.1" in failed["error"] and "\n" not in failed["error"]
        assert "publish it with: ln-export" in failed["error"] and "signature" not in failed["error"]
        assert 0 < sum(failed["waited"]) < 600, "bounded waiting"
    assert files_of(hub, "alice/there") == before
    assert set(files_of(hub, "alice/new")) == {".gitattributes"}
    assert hub.uploads.commits == []


def test_a_hub_out_of_reach_is_found_at_the_check(finished: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        pass  # its port is closed now
    (result,) = publish(hub, tmp_path, case(finished, "alice/x"))
    assert result["stage"] == "check" and "cannot reach 127.0.0.1" in result["error"]


# --------------------------------------------------------------------------------------------------------- the commands


def run_commands(hub: FakeHub, place: Path, *lines: str) -> list[Any]:
    """Commands one after the other in a process of its own, in the directory `place`: exit code, output and errors."""
    code = f"""
import json, sys, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
import huggingface_hub.utils._http as http
from command_line import invoke
from ln_removal.export import hub
assert hub.WAITS
hub.WAITS = (0.01,)
http.time = types.SimpleNamespace(sleep=lambda seconds: None)
for line in {lines!r}:
    ended = invoke(line)
    print(json.dumps([ended.exit_code, ended.stdout, ended.stderr]), flush=True)
"""
    done = run_client(code, hub.endpoint, place, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_ln_remove_publishes_what_it_made_and_ln_export_does_later(hub: FakeHub, copied: Path) -> None:
    removal = f"{REMOVE} --set training.compile=false --out new"
    hub.cuts["/storage/alice/mine/"] = 10_000
    refused, cut = run_commands(
        hub, copied, f"{REMOVE} --out refused --push-to-hub mallory/mine", f"{removal} --push-to-hub alice/mine"
    )
    assert refused[:2] == [2, ""] and refused[2].startswith("error: ") and refused[2].count("\n") == 1
    assert not (copied / "refused").exists(), "before anything was done"
    assert cut[0] == 2 and cut[2].splitlines()[-1].endswith(": ln-export new --push-to-hub alice/mine")
    assert "new/model" in cut[1] and (copied / "new" / "results.json").is_file()
    assert set(files_of(hub, "alice/mine")) == {".gitattributes"}

    hub.cuts.clear()
    later, resumed = run_commands(
        hub,
        copied,
        "ln-export new --push-to-hub alice/mine",
        f"{removal} --resume --json --push-to-hub lab/mine --tag v1",
    )
    assert later[0] == 0 and f"{hub.endpoint}/alice/mine" in later[1], later
    weights = (copied / "new" / "model" / "model.safetensors").read_bytes()
    assert files_of(hub, "alice/mine")["model.safetensors"] == weights
    assert resumed[0] == 0 and json.loads(resumed[1])["cross_entropy"]["ln_free"] is not None
    assert f"{hub.endpoint}/lab/mine" in resumed[2].splitlines()[-1]
    assert files_of(hub, "lab/mine", "v1")["model.safetensors"] == weights

    planted = [path for path in copied.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert planted == []
    assert all(TOKEN.encode() not in data for repo in hub.repos.values() for data in repo.revisions["main"].values())


@pytest.mark.slow
def test_ln_export_publishes_another_form(hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    done, *refused = run_commands(
        hub,
        tmp_path,
        "ln-export run --format stock --dtype bfloat16 --out stock16 --push-to-hub alice/stock",
        "ln-export run",
        "ln-export run --format stock --push-to-hub alice/x",
        "ln-export run/model --push-to-hub alice/x",
    )
    assert done[0] == 0, done
    files = files_of(hub, "alice/stock")
    assert files["model.safetensors"] == (tmp_path / "stock16" / "model.safetensors").read_bytes()
    assert "results.json" in files and "stock/model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert 'GPT2LMHeadModel.from_pretrained("alice/stock")' in card.text and "import ln_removal" not in card.text
    for (code, _, errors), part in zip(refused, ("--out DIR", "--out DIR", "run/model"), strict=True):
        assert code == 2 and part in errors
