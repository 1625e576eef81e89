import pytest

from llama.training.process import ProcessSetting


def test_the_first_block_turns_it_on_and_the_last_one_off() -> None:
    calls: list[str] = []

    def turn_on() -> bool:
        calls.append("on")
        return True

    setting = ProcessSetting(turn_on, lambda: calls.append("off"))
    first, second = setting.on(), setting.on()
    assert first.__enter__() and second.__enter__()
    first.__exit__(None, None, None)
    assert calls == ["on"]
    second.__exit__(None, None, None)
    assert calls == ["on", "off"]
    with pytest.raises(ZeroDivisionError), setting.on():
        raise ZeroDivisionError
    assert calls == ["on", "off", "on", "off"]


def test_what_did_not_turn_on_is_not_turned_off() -> None:
    calls: list[str] = []
    setting = ProcessSetting(lambda: False, lambda: calls.append("off"))
    with setting.on() as does:
        assert not does
    assert not calls
