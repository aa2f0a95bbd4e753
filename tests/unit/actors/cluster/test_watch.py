"""What is said of an actor that died."""

from ray.exceptions import RayActorError

from actors.cluster.waiting import death_message


def test_a_node_without_the_package_is_told_from_other_deaths():
    error = RayActorError(error_msg="The actor died.\nModuleNotFoundError: No module named 'kat_ray'")
    assert "scorers to load: its node lacks the package kat-ray. Use an image built from" in death_message(
        error, "scorers to load"
    )
    other = RayActorError(error_msg="The actor died.\nOSError: no room on the device\n")
    assert death_message(other, "it").startswith(
        "an actor died while waiting for it: OSError: no room on the device. "
    )
