"""Takes a process's rights away, by system call and argument, and limits what it uses. Linux on x86-64 and arm64.

In two steps. `forbid_the_machine` leaves computing, and reading files, which imports need: no file is written, made,
deleted or changed, no process, thread or socket made, no signal sent, no other process looked into. `forbid_files`
then takes reading away as well: what is left are memory, clocks, and the descriptors that the process has. Every other
call fails with PermissionError. What a filter cannot hide: how long things take, and the process's own ids.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Collection
from dataclasses import dataclass

MEMORY_BYTES = 1 << 30
_DESCRIPTORS = 64

# The system calls that are allowed whatever their arguments, with their numbers in the kernel's tables.
_X86_64 = """
    read 0 write 1 close 3 fstat 5 poll 7 lseek 8 munmap 11 brk 12 rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15
    pread64 17 readv 19 writev 20 select 23 sched_yield 24 mremap 25 dup 32 nanosleep 35 getpid 39 exit 60 uname 63
    gettimeofday 96 getrlimit 97 getrusage 98 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110
    sigaltstack 131 gettid 186 futex 202 sched_getaffinity 204 restart_syscall 219 clock_gettime 228 clock_getres 229
    clock_nanosleep 230 exit_group 231 pselect6 270 getrandom 318
"""
_AARCH64 = """
    dup 23 close 57 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 pselect6 72 ppoll 73 fstat 80 exit 93
    exit_group 94 futex 98 nanosleep 101 clock_gettime 113 clock_getres 114 clock_nanosleep 115 sched_getaffinity 123
    sched_yield 124 restart_syscall 128 sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigreturn 139 times 153
    uname 160 getrlimit 163 getrusage 165 gettimeofday 169 getpid 172 getppid 173 getuid 174 geteuid 175 getgid 176
    getegid 177 gettid 178 brk 214 munmap 215 mremap 216 getrandom 278
"""
_READ_FILES = {
    "x86_64": "stat 4 lstat 6 access 21 getcwd 79 readlink 89 getdents64 217 newfstatat 262 readlinkat 267 "
    "faccessat 269 statx 332 faccessat2 439",
    "aarch64": "getcwd 17 faccessat 48 getdents64 61 readlinkat 78 newfstatat 79 statx 291 faccessat2 439",
}


def _numbers(table: str) -> list[int]:
    return sorted(int(word) for word in table.split() if word.isdigit())


ALLOWED = {"x86_64": _numbers(_X86_64), "aarch64": _numbers(_AARCH64)}


@dataclass(frozen=True)
class _Rule:
    """A system call that is allowed if the low half of an argument is one of `values`, or has none of `bits`.

    The low half is all that the kernel reads of these arguments, or all that holds the forbidden bits.
    """

    numbers: dict[str, int]
    argument: int
    values: Collection[int] = ()
    bits: int = 0


_FCNTL = _Rule({"x86_64": 72, "aarch64": 25}, 1, values=(0, 1, 2, 3, 1030))  # F_DUPFD, _GETFD, _SETFD, _GETFL, _CLOEXEC
_IOCTL = _Rule({"x86_64": 16, "aarch64": 29}, 1, values=(0x5401,))  # TCGETS: is it a terminal?
_MADVISE = _Rule({"x86_64": 28, "aarch64": 233}, 2, values=(4, 8, 14, 15))  # DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE
_MMAP = _Rule({"x86_64": 9, "aarch64": 222}, 2, bits=4)  # PROT_EXEC
_MPROTECT = _Rule({"x86_64": 10, "aarch64": 226}, 2, bits=4)
_MMAP_CODE = _Rule(_MMAP.numbers, 2)
_MPROTECT_CODE = _Rule(_MPROTECT.numbers, 2)
_PRCTL = _Rule({"x86_64": 157, "aarch64": 167}, 0, values=(22,))  # PR_SET_SECCOMP: filters are added, never removed
_OPENAT = _Rule({"x86_64": 257, "aarch64": 56}, 2, bits=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

# classic BPF: struct sock_filter {u16 code; u8 jump_if_true; u8 jump_if_false; u32 operand}
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # EPERM
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data, of little-endian machines
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 1, 22, 38, 2


def limit(cpu_seconds: int) -> None:
    """Limit time, memory, descriptors, the size of files; no core dumps; end with the parent."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forbid_the_machine() -> None:
    """Leave computing and reading files, for good. Raises OSError if the kernel does not filter system calls."""
    machine = platform.machine()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    rules = (_FCNTL, _IOCTL, _MADVISE, _MMAP_CODE, _MPROTECT_CODE, _PRCTL, _OPENAT)
    _install(machine, ALLOWED[machine] + _numbers(_READ_FILES[machine]), rules)


def forbid_files() -> None:
    """Leave computing, for good. Comes after `forbid_the_machine`; what is imported by then is there, and no more."""
    machine = platform.machine()
    _install(machine, ALLOWED[machine], (_FCNTL, _IOCTL, _MADVISE, _MMAP, _MPROTECT))


def _install(machine: str, allowed: Collection[int], rules: Collection[_Rule]) -> None:
    instructions = b"".join(_filter(machine, allowed, rules))
    code = ctypes.create_string_buffer(instructions)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))


def _prctl(option: int, *arguments: int) -> None:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *(ctypes.c_ulong(value) for value in padded)):
        raise OSError(ctypes.get_errno(), f"the kernel refuses prctl {option}")


def _filter(machine: str, allowed: Collection[int], rules: Collection[_Rule]) -> list[bytes]:
    """The architecture, then every allowed number, then the rules; else refuse."""
    made = [
        _instruction(_LOAD, _ARCH_AT),
        _instruction(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    for number in allowed:
        made += [_instruction(_EQUAL, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    for rule in rules:
        checks = _checks(rule)
        made += [_instruction(_EQUAL, rule.numbers[machine], 0, len(checks)), *checks]
    return [*made, _instruction(_RETURN, _REFUSE)]


def _checks(rule: _Rule) -> list[bytes]:
    """What decides about one system call: these always return."""
    load = _instruction(_LOAD, _ARGUMENTS_AT + 8 * rule.argument)
    if not rule.values:
        return [
            load,
            _instruction(_ANY_BIT, rule.bits, 0, 1),
            _instruction(_RETURN, _REFUSE),
            _instruction(_RETURN, _ALLOW),
        ]
    equal = [
        step for value in rule.values for step in (_instruction(_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW))
    ]
    return [load, *equal, _instruction(_RETURN, _REFUSE)]


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)
