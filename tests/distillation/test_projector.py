import pytest
import torch
from torch import nn

from kava_trainer.distillation.projector import ElasticBottleneck, ProjectorConfig, build_decoder, build_projector
from kava_trainer.distillation.projector_files import (
    export_projector_file,
    export_projectors,
    load_projectors,
    restore_projectors,
    save_projectors,
)
from kava_trainer.utils.errors import BadRequest


def make(count=1, **changes):
    return nn.ModuleList(
        ElasticBottleneck(ProjectorConfig(**{"input_size": 6, "output_size": 4, **changes})) for _ in range(count)
    )


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 768), (1.0, 1536), (2.0, 3072)])
def test_shapes_of_the_home_case(ratio, hidden):
    projector = ElasticBottleneck(ProjectorConfig(1536, 896, ratio))
    assert projector.up.weight.shape == (hidden, 1536)
    assert projector(torch.randn(2, 3, 1536)).shape == (2, 3, 896)


def test_the_function_is_the_defined_one():
    projector = make(dropout=0.5)[0].eval()
    x = torch.randn(5, 6)
    inner = nn.functional.layer_norm(x, (6,), projector.norm.weight, projector.norm.bias)
    inner = nn.functional.silu(inner @ projector.up.weight.T + projector.up.bias)
    torch.testing.assert_close(projector(x), inner @ projector.down.weight.T + projector.down.bias)


def test_bf16_states_are_projected_in_the_projectors_own_type():
    assert make()[0](torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.float32


def test_saved_projectors_come_back_equal(tmp_path):
    projectors = make(2)
    save_projectors(projectors, tmp_path / "p.pth")
    loaded = load_projectors(tmp_path / "p.pth")
    assert [p.config for p in loaded] == [p.config for p in projectors]
    for ours, theirs in zip(projectors.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [f.name for f in tmp_path.iterdir()] == ["p.pth"]
    assert set(torch.load(tmp_path / "p.pth", weights_only=True)) == {"config", "state_dict", "decoders", "use"}


@pytest.mark.parametrize("anchor", ["none", "pca"])
def test_an_exported_projector_gives_the_same_outputs_bit_for_bit(tmp_path, anchor):
    projectors = nn.ModuleList(build_projector(ProjectorConfig(6, 4, 0.5, 0.0, anchor)) for _ in range(2))
    for tensor in projectors.state_dict().values():
        nn.init.normal_(tensor)
    use = {"direction": "teacher_to_student", "pairs": [[1, 2], [2, 4]]}
    export_projectors(projectors, tmp_path / "own", use)
    save_projectors(projectors, tmp_path / "p.pth", use)
    assert export_projector_file(tmp_path / "p.pth", tmp_path / "converted")
    states = torch.randn(3, 6)
    for folder in (tmp_path / "own", tmp_path / "converted"):
        assert {path.name for path in folder.iterdir()} == {"config.json", "projector.safetensors"}
        loaded = load_projectors(folder)
        assert [projector.config for projector in loaded] == [projector.config for projector in projectors]
        assert all(torch.equal(ours(states), theirs(states)) for ours, theirs in zip(projectors, loaded, strict=True))
        restore_projectors(projectors, folder, use)
    assert (tmp_path / "own" / "config.json").read_text() == (tmp_path / "converted" / "config.json").read_text()


def test_a_file_without_a_projector_is_not_exported(tmp_path):
    save_projectors(nn.ModuleList(), tmp_path / "p.pth")
    assert not export_projector_file(tmp_path / "p.pth", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "projector.safetensors").unlink(), "no projector file at"),
        (lambda folder: (folder / "projector.safetensors").write_bytes(b"no"), "not a projector file"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a projector file"),
        (lambda folder: export_projectors(make(input_size=8), folder.parent / "other"), None),
    ],
)
def test_a_broken_folder_of_a_projector_is_refused(tmp_path, spoil, said):
    export_projectors(make(), tmp_path / "own")
    spoil(tmp_path / "own")
    if said is None:
        (tmp_path / "other" / "config.json").replace(tmp_path / "own" / "config.json")
    with pytest.raises(BadRequest, match=said or "size mismatch|not a projector file"):
        load_projectors(tmp_path / "own")


def test_a_projector_of_other_widths_is_refused(tmp_path):
    save_projectors(make(input_size=8), tmp_path / "p.pth")
    with pytest.raises(BadRequest, match="does not fit this run"):
        restore_projectors(make(), tmp_path / "p.pth")


def bridges(rank, count=2):
    return nn.ModuleList(build_projector(ProjectorConfig(6, 4, anchor="pca", rank=rank)) for _ in range(count))


def test_a_bridge_comes_back_with_its_rank(tmp_path):
    saved = bridges(3)
    for tensor in saved.state_dict().values():
        nn.init.normal_(tensor)
    save_projectors(saved, tmp_path / "p.pth")
    export_projectors(saved, tmp_path / "folder")
    teacher, student = torch.randn(5, 6), torch.randn(5, 4)
    for loaded in (load_projectors(tmp_path / "p.pth"), load_projectors(tmp_path / "folder")):
        for ours, theirs in zip(saved, loaded, strict=True):
            assert ours.config == theirs.config
            assert torch.equal(ours(teacher), theirs(teacher))
            assert torch.equal(ours.student(student), theirs.student(student))
    assert [projector.rank for projector in load_projectors(tmp_path / "p.pth")] == [3, 3]


def test_an_open_rank_is_that_of_the_file_and_another_one_is_refused(tmp_path):
    saved = bridges(3)
    nn.init.normal_(saved[1].student.weight)
    save_projectors(saved, tmp_path / "p.pth")
    for own in (bridges("auto"), bridges("auto").to(torch.float64)):
        restore_projectors(own, tmp_path / "p.pth")
        restore_projectors(own, tmp_path / "p.pth")
        assert [bridge.config.rank for bridge in own] == [3, 3]
        assert torch.equal(own[1].student.weight, saved[1].student.weight.to(own[1].student.weight))
    for other in (bridges(2), bridges("auto", count=1), nn.ModuleList([build_projector(ProjectorConfig(6, 4))] * 2)):
        with pytest.raises(BadRequest, match="does not fit this run"):
            restore_projectors(other, tmp_path / "p.pth")


@pytest.mark.parametrize(("rank", "anchor"), [(0, "pca"), (5, "pca"), ("8", "pca"), (True, "pca"), (3, "none")])
def test_a_bridge_that_cannot_be_is_refused(rank, anchor):
    with pytest.raises(ValueError, match=r"bridge is .*; write a whole number from 1 to 4|the anchor is none"):
        ProjectorConfig(6, 4, anchor=anchor, rank=rank)


def test_a_file_from_before_bridges_is_read(tmp_path):
    save_projectors(make(), tmp_path / "p.pth")
    content = torch.load(tmp_path / "p.pth", weights_only=True)
    for config in content["config"]:
        del config["rank"]
    torch.save(content, tmp_path / "old.pth")
    restore_projectors(make(), tmp_path / "old.pth")


def test_a_projector_of_another_use_is_refused(tmp_path):
    use = {"direction": "teacher_to_student", "pairs": [[2, 4]]}
    save_projectors(make(), tmp_path / "p.pth", use)
    restore_projectors(make(), tmp_path / "p.pth", use)
    with pytest.raises(BadRequest, match="was trained for"):
        restore_projectors(make(), tmp_path / "p.pth", {**use, "direction": "student_to_teacher"})


def test_decoders_come_back_where_they_were_saved(tmp_path):
    first, second = (nn.ModuleList([build_decoder(ProjectorConfig(6, 4))]) for _ in range(2))
    save_projectors(make(), tmp_path / "p.pth", decoders=first)
    restore_projectors(make(), tmp_path / "p.pth", decoders=second)
    assert torch.equal(first[0].weight, second[0].weight)
    save_projectors(make(), tmp_path / "p.pth")
    with pytest.raises(BadRequest, match="holds no decoders"):
        restore_projectors(make(), tmp_path / "p.pth", decoders=second)


@pytest.mark.parametrize("surroundings", ["bfloat16", "autocast"])
def test_the_principal_projection_stays_in_float32(surroundings):
    projector = build_projector(ProjectorConfig(6, 4, anchor="pca"))
    nn.init.normal_(projector.weight)
    states = torch.randn(3, 6)
    expected = projector(states)
    if surroundings == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(projector(states), expected)
    else:
        assert projector.to(torch.bfloat16)(states).dtype == torch.float32


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadRequest, match=r"no projector file at .*gone\.pth"):
        load_projectors(tmp_path / "gone.pth")


def test_a_file_that_carries_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save(Payload(), tmp_path / "evil.pth")
    with pytest.raises(BadRequest, match="not a projector file"):
        load_projectors(tmp_path / "evil.pth")
