import os
import signal

from sqspipes_mp.ipc.stack_dump import DUMP, StackFile, users_part

_DUMP = """Fatal Python error: Segmentation fault

Thread 0x01 (most recent call first):
  File "/x/sqspipes_mp/worker/receive/intake.py", line 42 in run

Current thread 0x02 (most recent call first):
  File "/usr/lib/ctypes/__init__.py", line 519 in string_at
  File "/home/me/app.py", line 9 in work
  File "/x/sqspipes_mp/worker/run/function.py", line 51 in call
  File "/x/sqspipes_mp/worker/run/runner.py", line 99 in _run

Extension modules: numpy (total: 1)
"""


def test_only_the_users_frames_are_kept():
    assert users_part(_DUMP) == (
        "Fatal Python error: Segmentation fault\n"
        "Current thread 0x02 (most recent call first):\n"
        '  File "/usr/lib/ctypes/__init__.py", line 519 in string_at\n'
        '  File "/home/me/app.py", line 9 in work'
    )


def test_a_dump_without_a_running_call_is_kept_whole():
    text = _DUMP.replace("function.py", "other.py")
    assert users_part(text) == text.strip()
    assert users_part("") == ""


def test_a_dump_is_whole_once_the_main_threads_first_frame_is_written():
    stack = StackFile()
    text = _DUMP.partition("Extension")[0].strip().encode()
    rest = [b'\n  File "/x/sqspipes_mp/worker/main.py", line 96 in _work', b'\n  File "/x/sqspipes_mp/worker/main.py"']
    for part in [text, *rest, b", line 58 in worker_mai"]:
        os.write(stack.fileno(), part)
        assert not stack.whole
    os.write(stack.fileno(), b"n\n")
    assert stack.whole
    stack.clear()
    assert not stack.whole
    os.write(stack.fileno(), text + b"\n  ...\n")
    assert stack.whole
    stack.close()


def test_a_child_answers_the_dump_signal_while_it_is_busy():
    stack = StackFile()
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        stack.arm()
        os.write(told, b"x")
        while True:
            pass
    os.read(ready, 1)
    os.kill(pid, DUMP)
    # A dump arrives frame by frame, and the busy child never ends by itself.
    while "test_a_child_answers_the_dump_signal_while_it_is_busy" not in stack.read():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in (ready, told):
        os.close(fd)
    stack.close()
