"""Finding images: shipped, cached, compiled, PTX; and what is said where none of these gives one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from python_runs import python

import lwkd
from lwkd.kernels import compile as kernel_compiler
from lwkd.kernels import images, packs, spec
from lwkd.kernels.compile import CompileError, make_image
from lwkd.kernels.packs import Image, PackError

VARIANT = "attention_resize_fwd BLOCK=256 num_warps=4"
OTHER = "hutchinson_layers_fwd BLOCK=1024 num_warps=4"


def image_of(variant: str = VARIANT, target: str = "sm_90", code: bytes = b"code") -> Image:
    return Image(variant, target, code, variant.split()[0], (8, 8, 8, 4), 2, 32, 4)


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch) -> Path:
    """A package that ships nothing yet, and an empty cache."""
    monkeypatch.setattr(images, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("LWKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "_unkept", {})
    images.warn_once.cache_clear()
    return tmp_path / "shipped"


@pytest.fixture
def no_triton(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or name == "lwkd.kernels.compile"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(lwkd.kernels, "compile", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def make_other_version(path: Path) -> None:
    """Turn a pack into one that was made from other sources."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[packs.MANIFEST] = members[packs.MANIFEST].replace(packs.sources().encode(), b"0123456789abcdef")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_pack_gives_back_what_was_written(tmp_path):
    path = tmp_path / "folder" / "sm_90.zip"
    written = [image_of(VARIANT, code=b"a" * 1000), image_of(OTHER, code=bytes(range(256)))]
    packs.write_pack(path, "3.6.0", written)
    assert [packs.read_image(path, image.variant, "sm_90") for image in written] == written
    assert packs.read_manifest(path, "sm_90")["triton"] == "3.6.0"
    first = path.read_bytes()
    packs.write_pack(path, "3.6.0", written)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_shipped_comes_first(shipped):
    packs.write_pack(shipped / "sm_90.zip", "3.6.0", [image_of()])
    assert images.find(VARIANT, 90) == (b"code", "attention_resize_fwd", [8, 8, 8, 4], 2, 32, 4)


def test_compiled_once_and_kept(tmp_path, monkeypatch):
    code, entry, parameters, hidden, shared, warps = images.find(VARIANT, 90)
    assert code.startswith(b"\x7fELF")
    assert (entry, parameters, warps) == ("attention_resize_fwd", [8, 8, 8, 4], 4)
    (kept,) = cached_files(tmp_path)
    assert packs.sources() in str(kept)
    assert f"triton-{images.triton_version()}" in str(kept)
    monkeypatch.setattr(images, "_compiled", None)  # calling it would be an error
    assert images.find(VARIANT, 90) == (code, entry, parameters, hidden, shared, warps)
    assert images.missing([VARIANT, OTHER], "sm_90") == [OTHER]


def test_what_a_pack_lacks_is_compiled(shipped):
    packs.write_pack(shipped / "sm_90.zip", "3.6.0", [image_of(OTHER)])
    assert images.missing([VARIANT, OTHER], "sm_90") == [VARIANT]
    assert images.find(VARIANT, 90)[0].startswith(b"\x7fELF")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_cache_is_made_again(damage, tmp_path):
    good = images.find(VARIANT, 90)
    (path,) = cached_files(tmp_path)
    whole = path.read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "empty": b"",
        "foreign": b"not a pack at all" * 10,
    }
    path.write_bytes(broken[damage])
    with pytest.raises(PackError, match="damaged"):
        packs.read_image(path, VARIANT, "sm_90")
    assert images.find(VARIANT, 90) == good
    assert path.read_bytes() == whole


def test_damaged_package_is_refused(shipped, no_triton):
    path = shipped / "sm_90.zip"
    packs.write_pack(path, "3.6.0", [image_of()])
    path.write_bytes(path.read_bytes()[:-30])
    with (
        pytest.warns(RuntimeWarning, match=r"sm_90\.zip is damaged .*It is not used"),
        pytest.raises(RuntimeError, match=r"sm_90\.zip: refused, it is damaged"),
    ):
        images.find(VARIANT, 90)


def test_images_of_another_version_are_refused(shipped, no_triton):
    path = shipped / "sm_90.zip"
    packs.write_pack(path, "3.6.0", [image_of()])
    make_other_version(path)
    message = (
        rf"images from another version of the kernels \(lwkd {lwkd.__version__}, sources 0123456789abcdef; installed "
        rf"are lwkd {lwkd.__version__}, sources {packs.sources()}\)"
    )
    with pytest.warns(RuntimeWarning, match=message), pytest.raises(RuntimeError, match=message):
        images.find(VARIANT, 90)
    assert "refused" in images.describe(90)


def test_images_of_another_version_give_way_to_triton(shipped):
    packs.write_pack(shipped / "sm_90.zip", "3.6.0", [image_of()])
    make_other_version(shipped / "sm_90.zip")
    with pytest.warns(RuntimeWarning, match="another version"):
        assert images.find(VARIANT, 90)[0].startswith(b"\x7fELF")


def test_a_pack_under_another_name_is_refused(shipped, no_triton):
    packs.write_pack(shipped / "sm_90.zip", "3.6.0", [image_of(target="sm_80")])
    with pytest.warns(RuntimeWarning, match="holds images for sm_80"), pytest.raises(RuntimeError):
        images.find(VARIANT, 90)


def test_ptx_where_nothing_else_is(shipped, no_triton):
    packs.write_pack(shipped / "ptx80.zip", "3.6.0", [image_of(target="ptx80", code=b"ptx\0")])
    assert images.find(VARIANT, 121)[0] == b"ptx\0"
    with pytest.raises(RuntimeError, match="sm_75"):
        images.find(VARIANT, 75)


def test_ptx_where_triton_does_not_know_the_architecture(shipped):
    packs.write_pack(shipped / "ptx80.zip", "3.6.0", [image_of(target="ptx80", code=b"ptx\0")])
    with pytest.warns(
        RuntimeWarning, match=r"cannot compile attention_resize_fwd .* for sm_199: .*not a recognized processor"
    ):
        assert images.find(VARIANT, 199)[0] == b"ptx\0"


def test_nothing_at_all_says_where_and_what_to_do(shipped, no_triton, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        images.find(VARIANT, 90)
    message = str(caught.value)
    for part in (
        repr(VARIANT),
        "sm_90",
        f"{shipped}/sm_90.zip: not there",
        f"{tmp_path}/cache: not there",
        "Triton: cannot be imported",
        f"{shipped}/ptx80.zip: not there",
        "pip install triton",
        "python -m lwkd.kernels.compile --arch 90 --out DIR",
    ):
        assert part in message
    assert "not to be had" in images.describe(90)


def test_without_triton_whatever_the_cache_holds_will_do(no_triton, tmp_path):
    path = images._kept_files(VARIANT, "sm_90")
    assert path == []
    folder = tmp_path / "cache" / f"{packs.sources()}-triton-3.7.1" / "sm_90"
    packs.write_pack(folder / images._file_name(VARIANT), "3.7.1", [image_of()])
    assert images.find(VARIANT, 90)[0] == b"code"
    assert images.describe(90) == f"kept in {tmp_path / 'cache'}"


def test_an_unknown_variant_is_an_error_before_any_search():
    with pytest.raises(ValueError, match="no kernel variant is called"):
        images.find("attention_resize_fwd BLOCK=257 num_warps=4", 90)


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, recwarn):
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = images.find(VARIANT, 90)
    assert [str(warning.message) for warning in recwarn if "cannot be kept" in str(warning.message)]
    recwarn.clear()
    assert images.find(VARIANT, 90) == first
    images.find(OTHER, 90)
    assert not recwarn.list


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(RuntimeWarning, match="Set LWKD_CACHE_DIR to a folder that can be written to"):
        assert images.find(VARIANT, 90)[0].startswith(b"\x7fELF")


@pytest.mark.parametrize("problem", ["another user", "group", "everybody"])
def test_a_cache_that_others_can_write_to_is_refused(problem, tmp_path, monkeypatch):
    """What lies there runs on the GPU. The user named the folder, so that passing it over in silence is no answer."""
    images.keep(image_of())
    folder = tmp_path / "cache"
    if problem == "another user":
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        said = rf"belongs to user {folder.stat().st_uid}, and this process runs as user"
    else:
        folder.chmod(0o770 if problem == "group" else 0o707)
        said = rf"can be written by others \(mode 07..\)\. Run: chmod go-w {folder}"
    for attempt in (lambda: images.find(VARIANT, 90), lambda: images.missing([OTHER], "sm_90"), images.writable_cache):
        with pytest.raises(RuntimeError, match=said):
            attempt()
    assert "but not kept" in images.describe(90)


def test_part_of_the_cache_that_others_can_write_to_is_not_used(tmp_path):
    images.keep(image_of())
    (kept,) = cached_files(tmp_path)
    for path in (kept, kept.parent, kept.parent.parent):
        mode = path.stat().st_mode
        path.chmod(mode | stat.S_IWGRP)
        with pytest.warns(RuntimeWarning, match=rf"not used: {path} can be written by others"):
            assert images.missing([VARIANT], "sm_90") == [VARIANT]
        path.chmod(mode)
    assert images.find(VARIANT, 90)[0] == b"code"


def test_our_own_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("LWKD_CACHE_DIR", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        images.keep(image_of())
    finally:
        os.umask(before)
    (kept,) = (path for path in (tmp_path / "new").rglob("*") if path.is_file())
    folders = [folder for folder in kept.parents if tmp_path in folder.parents]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert not kept.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize("home", ["none", "one that cannot be written to", "another user's"])
def test_kernels_load_without_a_home_folder(home, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LWKD_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere" if home == "one that cannot be written to" else str(tmp_path))
    if home == "none":
        monkeypatch.setattr(Path, "home", no_home)
    elif home == "another user's":
        images.keep(image_of())
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    monkeypatch.setattr(kernel_compiler, "make_image", lambda variant, target: image_of(variant, target, b"made"))
    assert images.describe(90)
    assert images.missing([VARIANT], "sm_90") == [VARIANT]
    with pytest.warns(RuntimeWarning, match="cannot be kept .* every process compiles its own. Set LWKD_CACHE_DIR to"):
        assert images.find(VARIANT, 90)[0] == b"made"


def test_a_triton_without_cuobjdump_compiles_unchecked(monkeypatch):
    tool = kernel_compiler.triton.knobs.env_nvidia_tool
    find = tool.transform

    def find_others(self, path):
        if self.binary.startswith("cuobjdump"):
            raise RuntimeError(f"Cannot find {self.binary}")
        return find(self, path)

    monkeypatch.setattr(tool, "transform", find_others)
    with pytest.warns(RuntimeWarning, match="nobody checks whether images spill .* no cuobjdump"):
        assert images.find(VARIANT, 90)[0].startswith(b"\x7fELF")


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert images.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LWKD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert images.cache_folder() == tmp_path / "xdg" / "lwkd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert images.cache_folder() == tmp_path / "home" / ".cache" / "lwkd"


def test_description_of_a_whole_package(shipped):
    for target in ("sm_80", "sm_90", "ptx80"):
        packs.write_pack(shipped / f"{target}.zip", "3.6.0", [image_of(target=target)])
    compiled = f"compiled by Triton {images.triton_version()} when first needed and kept in {images.cache_folder()}"
    portable = "shipped as PTX, which the driver compiles"
    assert images.describe() == f"shipped for sm_80, sm_90, else {compiled}, else {portable}"
    assert images.describe(90) == f"shipped for sm_90, else {compiled}, else {portable}"
    assert images.describe(75) == compiled


def test_many_processes_at_once(tmp_path):
    """All compile the same image, and all get it."""
    code = (
        "import hashlib, sys, time, pathlib; from lwkd.kernels import compile, images\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        f"print(hashlib.sha256(images.find({VARIANT!r}, 90)[0]).hexdigest())"
    )
    ready = [tmp_path / f"ready_{number}" for number in range(4)]
    running = [
        subprocess.Popen([sys.executable, "-c", code, place, tmp_path / "go"], stdout=subprocess.PIPE, text=True)
        for place in ready
    ]
    try:
        while not all(place.exists() for place in ready):
            assert all(process.poll() is None for process in running)
        (tmp_path / "go").touch()
        outputs = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert len(set(outputs)) == 1
    assert outputs[0].strip()
    (kept,) = cached_files(tmp_path)
    assert packs.read_image(kept, VARIANT, "sm_90").variant == VARIANT


def test_errors_of_the_compiler_are_named_and_not_printed(monkeypatch, capfd):
    from triton.runtime.errors import PTXASError

    def fail(*_, **__):
        print("// the whole PTX")
        raise PTXASError("`ptxas` failed with error code 255")

    monkeypatch.setattr(kernel_compiler.triton, "compile", fail)
    with pytest.raises(
        CompileError, match=r"cannot compile attention_resize_fwd .* for sm_90: PTXASError: .*`ptxas` failed"
    ):
        make_image(VARIANT, "sm_90")
    assert "PTX" not in capfd.readouterr().out


def test_an_image_that_is_not_as_stated_is_refused(monkeypatch):
    parse, wrong = spec.parse, spec.parse(OTHER)
    compiled = kernel_compiler.compile_variant(VARIANT, "sm_90")
    monkeypatch.setattr(spec, "parse", lambda text: wrong if text == VARIANT else parse(text))
    with pytest.raises(CompileError, match="parameters should be"):
        kernel_compiler.image_of(compiled, VARIANT, "sm_90")


def test_the_interpreter_is_refused():
    code = f"from lwkd.kernels.compile import make_image; make_image({VARIANT!r}, 'sm_90')"
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1 makes Triton interpret its kernels. Start a process without it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "name an architecture"), (["--ptx"], "--ptx is for shipping, and needs --out")]
)
def test_the_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernel_compiler.main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_line(tmp_path, monkeypatch, capsys):
    some = [spec.parse(VARIANT), spec.parse(OTHER)]
    monkeypatch.setattr(spec, "all_variants", lambda elements: some)
    assert kernel_compiler.main(["--arch", "80", "--ptx", "--out", str(tmp_path / "made"), "--jobs", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("sm_80: 2 images, ")
    assert second.startswith("ptx80: 2 images, ")
    assert packs.read_image(tmp_path / "made" / "sm_80.zip", OTHER, "sm_80").code.startswith(b"\x7fELF")
    assert packs.read_image(tmp_path / "made" / "ptx80.zip", OTHER, "ptx80").code.endswith(b"\0")

    images.keep(make_image(VARIANT, "sm_80"))
    assert kernel_compiler.main(["--arch", "80", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == f"sm_80: 1 images compiled, the others were there, {tmp_path / 'cache'}\n"
    assert images.missing([VARIANT, OTHER], "sm_80") == []
    assert kernel_compiler.main(["--arch", "80", "--jobs", "1"]) == 0
    assert capsys.readouterr().out.startswith("sm_80: 0 images compiled")
