"""What shuts a worker in: Linux namespaces, a read-only root without the user's files, a system-call
filter, limits.

Standard library only; loaded by path in the worker, before any tool runs. Each protection is tried on its
own, and what holds is reported by name, so that a machine without user namespaces still runs tools, behind
fewer walls:

    user, mount, network, pid, ipc   namespaces of one `unshare`: no network device, no sight of other
    processes root        only the Python library, shared libraries and a small scratch folder exist, all
    else read-only or absent seccomp     no new process, no program start, no socket, no signal to others,
    no privileged call;
                without `root` also no write to any file
    capabilities, limits   none left; memory, file size, open files, CPU seconds per call
"""

import ctypes
import os
import platform
import resource
import struct
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SCRATCH_BYTES = 16 << 20
DEVICES = ("null", "zero", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare_namespaces():
    """Enters new namespaces; a child forked after this is process 1 of its own pid namespace."""
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def library_folders():
    """The folders a running Python needs: its own library and the system's shared libraries."""
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", os.path.dirname(os.__file__)]
    wanted += [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    return [folder for folder in dict.fromkeys(wanted) if os.path.isdir(folder)]


def mount(source, target, kind, flags, data=None):
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(
        libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}"
    )


def change_root(root, packages):
    """Replaces / by a fresh tmpfs at `root` with read-only libraries and a writable, small /tmp."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for folder in [*library_folders(), *packages]:
        target = root + folder
        if os.path.islink(folder):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(folder), target)
            continue
        os.makedirs(target, exist_ok=True)
        mount(folder, target, None, MS_BIND | MS_REC)
        mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.makedirs(root + "/dev")
    for device in DEVICES:
        os.close(os.open(f"{root}/dev/{device}", os.O_CREAT))
        mount(f"/dev/{device}", f"{root}/dev/{device}", None, MS_BIND)
    os.makedirs(root + "/tmp")
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES}")
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    check(libc.syscall(ctypes.c_long(pivot_root), b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    mount(None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def drop_capabilities():
    """None is left, neither here nor in the namespaces just made; `no_new_privs` keeps it so."""
    header = struct.pack("<Ii", 0x20080522, 0)
    check(libc.capset(header, bytes(24)), "capset")


def set_limits(memory, file_bytes):
    """Memory in bytes of address space (threads and mappings included); no core files; few open files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def die_with_parent():
    check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "parent-death signal")


def limit_cpu(seconds):
    """Lets this process burn `seconds` more of CPU time, then SIGXCPU comes. Set anew before every call."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def numbers(text):
    return tuple(int(pair.split("=")[1]) for pair in text.split())


# System calls by machine. `denied`: never. `writing`: denied where the root could not be changed. `clone`:
# allowed for threads only. `signal`: allowed to oneself only. `open`: (number, index of the flags argument).
SYSCALLS = {
    "x86_64": {
        "arch": 0xC000003E,
        "denied": numbers(
            "socket=41 socketpair=53 fork=57 vfork=58 execve=59 execveat=322 ptrace=101 setpgid=109 "
            "setsid=112 unshare=272 setns=308 mount=165 umount2=166 pivot_root=155 chroot=161 "
            "process_vm_readv=310 process_vm_writev=311 bpf=321 perf_event_open=298 add_key=248 "
            "request_key=249 keyctl=250 memfd_create=319 shmget=29 mq_open=240 userfaultfd=323 "
            "open_by_handle_at=304 rt_sigqueueinfo=129 rt_tgsigqueueinfo=297 init_module=175 "
            "finit_module=313 kexec_load=246 tkill=200"
        ),
        "writing": numbers(
            "truncate=76 ftruncate=77 rename=82 mkdir=83 rmdir=84 creat=85 link=86 unlink=87 symlink=88 "
            "chmod=90 fchmod=91 chown=92 fchown=93 lchown=94 utime=132 mknod=133 setxattr=188 "
            "lsetxattr=189 fsetxattr=190 utimes=235 mkdirat=258 mknodat=259 fchownat=260 futimesat=261 "
            "unlinkat=263 renameat=264 linkat=265 symlinkat=266 fchmodat=268 utimensat=280 fallocate=285 "
            "renameat2=316"
        ),
        "clone": 56,
        "signal": numbers("kill=62 tgkill=234"),
        "open": ((2, 1), (257, 2)),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "denied": numbers(
            "socket=198 socketpair=199 execve=221 execveat=281 ptrace=117 setpgid=154 setsid=157 "
            "unshare=97 setns=268 mount=40 umount2=39 pivot_root=41 chroot=51 process_vm_readv=270 "
            "process_vm_writev=271 bpf=280 perf_event_open=241 add_key=217 request_key=218 keyctl=219 "
            "memfd_create=279 shmget=194 mq_open=180 userfaultfd=282 open_by_handle_at=265 "
            "rt_sigqueueinfo=138 rt_tgsigqueueinfo=240 init_module=105 finit_module=273 kexec_load=104 "
            "tkill=130"
        ),
        "writing": numbers(
            "setxattr=5 lsetxattr=6 fsetxattr=7 mknodat=33 mkdirat=34 unlinkat=35 symlinkat=36 linkat=37 "
            "renameat=38 truncate=45 ftruncate=46 fallocate=47 fchmod=52 fchmodat=53 fchownat=54 "
            "fchown=55 utimensat=88 renameat2=276"
        ),
        "clone": 220,
        "signal": numbers("kill=129 tgkill=131"),
        "open": ((56, 2),),
    },
}
# pidfd_send_signal io_uring_setup io_uring_enter io_uring_register pidfd_open pidfd_getfd
COMMON_DENIED = (424, 425, 426, 427, 434, 438)
NOT_THERE = (
    435,
    437,
)  # clone3, openat2: their arguments cannot be filtered; callers fall back to clone, openat
CLONE_THREAD, WRITE_FLAGS = 0x10000, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LOAD, EQUAL, GREATER_EQUAL, BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EACCES, ENOSYS = 1, 13, 38


def filter_program(machine, allow_writing):
    """The filter as BPF instructions (code, jump if true, jump if false, constant). Each rule is a small
    block that either returns or falls through to the next with the system call's number loaded."""
    table = SYSCALLS[machine]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, table["arch"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [(GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # the x32 twin of every call

    def deny(number, error):
        program.extend([(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | error)])

    def on_argument(number, index, test):
        block = [(LOAD, 0, 0, 16 + 8 * index), *test, (RETURN, 0, 0, ALLOW)]
        program.extend([(EQUAL, 0, len(block), number), *block])

    for number in (*table["denied"], *COMMON_DENIED):
        deny(number, EPERM)
    for number in NOT_THERE:
        deny(number, ENOSYS)
    refuse = (RETURN, 0, 0, ERRNO | EPERM)
    on_argument(table["clone"], 0, [(BITS, 1, 0, CLONE_THREAD), refuse])
    for number in table["signal"]:
        on_argument(number, 0, [(EQUAL, 1, 0, os.getpid()), refuse])
    if not allow_writing:
        for number in table["writing"]:
            deny(number, EACCES)
        for number, index in table["open"]:
            on_argument(number, index, [(BITS, 0, 1, WRITE_FLAGS), (RETURN, 0, 0, ERRNO | EACCES)])
    program.append((RETURN, 0, 0, ALLOW))
    return program


def install_filter(allow_writing):
    if platform.machine() not in SYSCALLS:
        raise OSError(f"no system-call table for {platform.machine()}")
    program = filter_program(platform.machine(), allow_writing)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header = Program(len(program), ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0), "seccomp")


def try_step(report, name, step, *args):
    """Runs one protection and books under `name` whether it holds: True, or the reason it does not."""
    try:
        step(*args)
        report[name] = True
    except (OSError, AttributeError, KeyError, ValueError) as error:
        report[name] = str(error) or type(error).__name__
    return report[name] is True
