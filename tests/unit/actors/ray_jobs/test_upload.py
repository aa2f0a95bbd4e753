"""What goes to a cluster with `kat-ray submit`: the names in the archive that Ray's own packager makes."""

import zipfile
from pathlib import Path

import pytest

from actors.ray_jobs.upload import MIB, dashboard_limit, plan_upload
from kat_ray.cli import main as cli
from kat_ray.errors import UserError
from tests.support.configs import make_config
from tests.support.paths import ROOT

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"
ACCOUNT = '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nMII"}'
SECRETS = (
    ".env", ".env.local", "sub/prod.env", ".netrc", "sub/.netrc", ".ssh/id_rsa", ".ssh/config", "id_rsa",
    "id_ed25519.pub", "keys/server.pem", "keys/server.key", "credentials.json", "my-service-account.json",
    ".aws/credentials", ".kube/config", ".config/gcloud/application_default_credentials.json", ".git/config",
    "sub/.git/config", ".git-credentials", ".npmrc", ".huggingface/token", "home/.cache/huggingface/token",
)  # fmt: skip
KEPT = (
    "my.yaml",
    "data/train.jsonl",
    "src/module.py",
    "src/keys.py",
    "config/settings.json",
    ".rayignore",
    ".gitignore",
)


def config(student="a", teacher="b"):
    return make_config(student, teacher)


def write(root, *names, content="x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


def archive(upload, target):
    """Names of the files in what Ray makes of the folder with these excludes, its own among them."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    excludes = [*get_runtime_env_default_excludes(), *upload.excludes]
    create_package(str(upload.folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as made:
        return {name for name in made.namelist() if not name.endswith("/")}


def uploaded(root, tmp_path, **models):
    """The plan, whose files are found to be those of the archive."""
    upload = plan_upload(root, config(**models))
    assert archive(upload, tmp_path / "made.zip") == set(upload.files)
    assert upload.archive_bytes >= (tmp_path / "made.zip").stat().st_size
    return upload


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    write(root, *SECRETS, *KEPT)
    write(root, ".gitignore", content="ignored/\n!.env\n")
    write(root, ".rayignore", content="*.parquet\n")
    write(root, "ignored/much.txt", "data/much.parquet")
    return root


def test_no_secret_is_in_the_archive(tree, tmp_path):
    upload = uploaded(tree, tmp_path)
    assert set(upload.files) == set(KEPT)
    said = "\n".join(upload.lines())
    assert (
        f"uploading {tree}: {len(KEPT)} files" in said and "left out, may hold secrets: " in said and ".env" in said
    )


def test_a_key_is_known_by_what_it_holds(tree, tmp_path):
    write(tree, "deploy", "odd name [1].txt", content=KEY)
    write(tree, "project-1a2b.json", content=ACCOUNT)
    upload = uploaded(tree, tmp_path)
    assert set(upload.files) == set(KEPT)
    assert {"deploy", "odd name [1].txt", "project-1a2b.json"} <= set(upload.left_out["may hold secrets"])


def test_environments_runs_and_weights_stay_here(tree, tmp_path):
    write(tree, "tools/py/pyvenv.cfg", "tools/py/lib/site.py", "venv/lib/site.py", ".venv-x/lib/site.py")
    write(tree, "out/first/config.yaml", "out/first/metrics.jsonl", "out/first/run.log", "runs/a/run.log")
    write(tree, "w/model.safetensors", "w/pytorch_model.bin", "w/model.gguf", "w/config.json")
    upload = uploaded(tree, tmp_path)
    assert set(upload.files) == {*KEPT, "w/config.json"}
    assert upload.left_out["virtual environments"] == ["tools/py"]
    assert sorted(upload.left_out["runs and caches"]) == ["home/.cache", "out/first", "runs"]


def test_weights_that_the_job_reads_go_with_it_and_secrets_beside_them_do_not(tree, tmp_path):
    for model in ("models/student", "models/teacher", "models/other"):
        write(tree, f"{model}/model.safetensors", f"{model}/.env")
    upload = uploaded(tree, tmp_path, student="models/student", teacher=str(tree / "models/teacher"))
    assert {n for n in upload.files if n.startswith("models")} == {
        "models/student/model.safetensors", "models/teacher/model.safetensors",
    }  # fmt: skip


def test_links_out_of_the_folder_are_not_followed(tree, tmp_path):
    write(tmp_path / "elsewhere", "a", "b")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "file").symlink_to(tmp_path / "elsewhere" / "a")
    (tree / "inside").symlink_to("my.yaml")
    (tree / "renamed").symlink_to(".ssh/config")
    upload = uploaded(tree, tmp_path)
    assert set(upload.files) == {*KEPT, "inside"}
    assert sorted(upload.left_out["links that lead out of the folder"]) == ["file", "linked"]


def test_this_working_tree_goes_with_its_demo(tmp_path):
    upload = uploaded(ROOT, tmp_path)
    assert {"kat_ray/demo/models/student/model.safetensors", "actors/driver/train.py"} <= set(upload.files)
    assert not any(".git/" in name or "__pycache__" in name for name in upload.files)
    upload.check_size(dashboard_limit())


def test_too_much_is_refused_before_it_is_sent(tree, tmp_path):
    for name, size in (("data/big.jsonl", 3 * MIB), ("data/small.jsonl", MIB)):
        with (tree / name).open("wb") as file:
            file.truncate(size)
    upload = uploaded(tree, tmp_path)
    upload.check_size(5 * MIB)
    with pytest.raises(
        UserError, match=r"4\.0 MiB would be uploaded.*takes 4\.0 MiB\. The largest: data/big\.jsonl \(3"
    ):
        upload.check_size(4 * MIB)


def test_a_dry_run_shows_every_file_the_largest_first_and_asks_no_cluster(tree, capfd, monkeypatch):
    monkeypatch.setattr("actors.ray_jobs.client.Jobs", lambda *_: pytest.fail("the cluster was asked"))
    write(tree, "data/train.jsonl", content="x" * 5000)
    write(tree, "my.yaml", content="student: {path: a}\nteacher: {path: b}\ndata: {path: data/train.jsonl}\n")
    command = ["submit", str(tree / "my.yaml"), "run.dir=/runs", "--working-dir", str(tree), "--dry-run"]
    assert cli.main(command) == 0
    out, err = capfd.readouterr()
    first, *lines = out.splitlines()
    assert first.startswith(f"uploading {tree}: {len(KEPT)} files, ")
    listed = [line.split(" bytes  ") for line in lines if " bytes  " in line]
    assert [int(size.replace(",", "")) for size, _ in listed[:2]] == [5000, (tree / "my.yaml").stat().st_size]
    assert [name for _, name in listed[:2]] == ["data/train.jsonl", "my.yaml"]
    assert {name for _, name in listed} == set(KEPT)
    assert lines[-1] == "the job would run: python -m kat_ray.cli train my.yaml run.dir=/runs"
    assert "packaging.py" not in err and "INFO" not in err


def test_a_dry_run_refuses_what_the_job_would_miss(tree, capfd):
    (tree / "ignored" / "my.yaml").write_text("student: {path: a}\nteacher: {path: b}\ndata: {path: c.jsonl}\n")
    command = ["submit", str(tree / "ignored/my.yaml"), "run.dir=/runs", "--working-dir", str(tree), "--dry-run"]
    assert cli.main(command) == 2
    assert "error: ignored/my.yaml: is not uploaded" in capfd.readouterr().err


def test_a_configuration_that_is_left_out_is_refused(tree):
    upload = plan_upload(Path(tree), config())
    upload.check_holds("my.yaml")
    with pytest.raises(UserError, match=r"^ignored/my\.yaml: is not uploaded"):
        upload.check_holds("ignored/my.yaml")
