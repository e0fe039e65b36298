from pathlib import Path

import pytest

from vila_m3_common.errors import UserError
from vila_m3_common.members import find_member


def test_a_zips_own_member_comes_before_one_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "bundles/composite"
    beside, inside = tmp_path / "expert_one", root / "members/expert_one"
    beside.mkdir(parents=True)
    root.mkdir(parents=True)
    assert find_member("expert_one", root) == beside
    inside.mkdir(parents=True)
    assert find_member("expert_one", root) == inside


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/expert").mkdir(parents=True)
    assert find_member(str(tmp_path / "mine/expert"), tmp_path / "root") == tmp_path / "mine/expert"
    monkeypatch.chdir(tmp_path)
    assert find_member("mine/expert", tmp_path / "root") == tmp_path / "mine/expert"


def test_a_missing_member_is_refused_with_the_places_looked_at(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"bundle expert_x was not found \(looked for .*members/expert_x, .*\); give the"
    ):
        find_member("expert_x", tmp_path)
