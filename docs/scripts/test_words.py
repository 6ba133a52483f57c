from sqspipes_mp import Engine


def shout(value):
    return value.upper()


def test_shout():
    assert Engine([shout], domain="test").call("hello") == ["HELLO"]


test_shout()
