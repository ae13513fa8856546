"""What shuts tool code in: Linux namespaces, a read-only root without the user's files, system-call
filters, limits.

Standard library only; loaded by path in the worker, before any tool runs. Each protection is tried on its
own, and what holds is reported by name:

    namespaces    one `unshare`: no network device, no sight of other processes, no shared memory with them
    root          only Python's library, shared libraries and a small scratch folder exist; all else absent,
                  what is there read-only
    seccomp       no new process, no program start, no socket, no signal or setting of another process, no
                  privileged call; without `root` also no write to any file
    capabilities, limits    none left; memory, file size, open files, CPU seconds per call

The worker itself starts a process for every call. With namespaces each call's process has a pid namespace to
itself and one filter serves all; without, a call's process adds a filter of its own (`shut_call_in`).
"""

import ctypes
import functools
import os
import platform
import resource
import signal
import struct
import sys
import time

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
PR_SET_CHILD_SUBREAPER, PR_SET_PTRACER = 36, 0x59616D61
CAP_SYS_ADMIN = 1 << 21
SCRATCH_BYTES, SCRATCH_FILES = 16 << 20, 4096
DEVICES = ("null", "zero", "urandom")

libc = ctypes.CDLL(None, use_errno=True)
python = ctypes.PyDLL(None, use_errno=True)  # the same, with Python's lock held: for what returns twice


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
        # Read-only: written to all the same, but its mode, which is the machine's, stays what it is.
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC
        mount(None, f"{root}/dev/{device}", None, flags)
    os.makedirs(root + "/tmp")
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    check(libc.syscall(ctypes.c_long(pivot_root), b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    mount(None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/")
    mount_scratch()


SCRATCH = "/tmp"


def mount_scratch():
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700"
    mount("tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, options)


def scratch_state():
    """What a call could have changed in the scratch folder: what lies in it, and its own record."""
    it = os.stat(SCRATCH)
    return os.listdir(SCRATCH), it.st_mode, it.st_uid, it.st_gid, it.st_mtime_ns, it.st_ctime_ns


def renew_scratch():
    """An empty scratch folder, whatever the last call left: a new one is mounted in its place."""
    check(libc.umount2(os.fsencode(SCRATCH), MNT_DETACH), "umount the scratch folder")
    mount_scratch()


def set_capabilities(kept):
    """Only `kept` (bits below 32) are left, here and in the namespaces just made; `no_new_privs` keeps it
    so."""
    header = struct.pack("<Ii", 0x20080522, 0)
    check(libc.capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)), "capset")


def set_limits(memory, file_bytes):
    """Memory in bytes of address space (threads and mappings included); no core files; few open files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def die_with_parent():
    check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "parent-death signal")


def hide_memory():
    """Bars other processes of the user, a call's process among them, from this one's /proc files."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def limit_cpu(seconds):
    """Lets this process burn `seconds` more of CPU time, then SIGXCPU comes."""
    soft = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def numbers(text):
    return tuple(int(pair.split("=")[1]) for pair in text.split())


# A call must not outlive its worker, open its own memory to others, or have signals sent on its behalf.
PRCTL_REFUSED = (PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_PTRACER)
FCNTL_REFUSED = (8, 10, 15, 1024, 1026)  # F_SETOWN F_SETSIG F_SETOWN_EX F_SETLEASE F_NOTIFY
IOCTL_REFUSED = (0x8901, 0x8902, 0x5452)  # FIOSETOWN SIOCSPGRP FIOASYNC
# System calls by machine. `denied`: never. `writing`: denied where the root could not be changed.
# `oneself`: a call may name its own process only. `options`: (number, index of the argument, values that are
# refused). `open`: (number, index of the flags argument).
SYSCALLS = {
    "x86_64": {
        "arch": 0xC000003E,
        "denied": numbers(
            "socket=41 socketpair=53 execve=59 execveat=322 ptrace=101 setpgid=109 "
            "setsid=112 unshare=272 setns=308 pivot_root=155 chroot=161 setxattr=188 lsetxattr=189 "
            "fsetxattr=190 semget=64 msgget=68 setpriority=141 sched_setparam=142 sched_setscheduler=144 "
            "sched_setaffinity=203 sched_setattr=314 ioprio_set=251 move_pages=279 migrate_pages=256 "
            "kcmp=312 process_vm_readv=310 process_vm_writev=311 bpf=321 perf_event_open=298 add_key=248 "
            "request_key=249 keyctl=250 memfd_create=319 shmget=29 mq_open=240 userfaultfd=323 "
            "open_by_handle_at=304 rt_sigqueueinfo=129 rt_tgsigqueueinfo=297 init_module=175 "
            "finit_module=313 kexec_load=246 tkill=200"
        ),
        "forks": numbers("fork=57 vfork=58"),
        "mounts": numbers("mount=165 umount2=166"),
        "writing": numbers(
            "truncate=76 ftruncate=77 rename=82 mkdir=83 rmdir=84 creat=85 link=86 unlink=87 symlink=88 "
            "chmod=90 fchmod=91 chown=92 fchown=93 lchown=94 utime=132 mknod=133 "
            "utimes=235 mkdirat=258 mknodat=259 fchownat=260 futimesat=261 "
            "unlinkat=263 renameat=264 linkat=265 symlinkat=266 fchmodat=268 utimensat=280 fallocate=285 "
            "renameat2=316"
        ),
        "clone": 56,
        "oneself": numbers("kill=62 tgkill=234"),
        "prlimit": 302,
        "options": ((157, 0, PRCTL_REFUSED), (72, 1, FCNTL_REFUSED), (16, 1, IOCTL_REFUSED)),
        "open": ((2, 1), (257, 2)),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "denied": numbers(
            "socket=198 socketpair=199 execve=221 execveat=281 ptrace=117 setpgid=154 setsid=157 "
            "unshare=97 setns=268 pivot_root=41 chroot=51 process_vm_readv=270 setxattr=5 lsetxattr=6 "
            "fsetxattr=7 semget=190 msgget=186 setpriority=140 sched_setparam=118 sched_setscheduler=119 "
            "sched_setaffinity=122 sched_setattr=274 ioprio_set=30 move_pages=239 migrate_pages=238 kcmp=272 "
            "process_vm_writev=271 bpf=280 perf_event_open=241 add_key=217 request_key=218 keyctl=219 "
            "memfd_create=279 shmget=194 mq_open=180 userfaultfd=282 open_by_handle_at=265 "
            "rt_sigqueueinfo=138 rt_tgsigqueueinfo=240 init_module=105 finit_module=273 kexec_load=104 "
            "tkill=130"
        ),
        "forks": (),
        "mounts": numbers("mount=40 umount2=39"),
        "writing": numbers(
            "mknodat=33 mkdirat=34 unlinkat=35 symlinkat=36 linkat=37 "
            "renameat=38 truncate=45 ftruncate=46 fallocate=47 fchmod=52 fchmodat=53 fchownat=54 "
            "fchown=55 utimensat=88 renameat2=276"
        ),
        "clone": 220,
        "oneself": numbers("kill=129 tgkill=131"),
        "prlimit": 261,
        "options": ((167, 0, PRCTL_REFUSED), (25, 1, FCNTL_REFUSED), (29, 1, IOCTL_REFUSED)),
        "open": ((56, 2),),
    },
}
# io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig fsmount fspick
# pidfd_getfd process_madvise mount_setattr process_mrelease
COMMON_DENIED = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 448)
HANDLES = (424, 434)  # pidfd_send_signal pidfd_open: for a worker, or where no other process can be seen
NOT_THERE = (
    435,
    437,
)  # clone3, openat2: their arguments cannot be filtered; callers fall back to clone, openat
CLONE_THREAD, WRITE_FLAGS = 0x10000, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LOAD, JUMP, EQUAL, GREATER_EQUAL, BITS, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EACCES, ENOSYS = 1, 13, 38
OWN_PID = 0x7B1DB1D7  # no process has it: pid_max is 2**22
REFUSE = (RETURN, 0, 0, ERRNO | EPERM)


class Rules:
    """A filter as BPF instructions (code, jump if true, jump if false, constant): a block of them per system
    call that is not plainly allowed, found by a binary search over the numbers. (The kernel tries a new
    filter on every number when it is installed, so one long chain would cost each call 0.2 ms.)"""

    def __init__(self, arch):
        self.arch, self.blocks = arch, {}

    def deny(self, number, error=EPERM):
        self.blocks[number] = [(RETURN, 0, 0, ERRNO | error)]

    def on_argument(self, number, index, test):
        self.blocks[number] = [(LOAD, 0, 0, 16 + 8 * index), *test, (RETURN, 0, 0, ALLOW)]

    def refuse_values(self, number, index, values):
        self.on_argument(number, index, [line for v in values for line in ((EQUAL, 0, 1, v), REFUSE)])

    def allow_values(self, number, index, values):
        steps = [(EQUAL, len(values) - place, 0, v) for place, v in enumerate(values)]
        self.on_argument(number, index, [*steps, REFUSE])

    def _search(self, numbers):
        if len(numbers) == 1:
            block = self.blocks[numbers[0]]
            return [(EQUAL, 0, len(block), numbers[0]), *block, (RETURN, 0, 0, ALLOW)]
        middle = len(numbers) // 2
        below, above = self._search(numbers[:middle]), self._search(numbers[middle:])
        # A jump spans at most 255 instructions; an unconditional one spans any number.
        return [(GREATER_EQUAL, 0, 1, numbers[middle]), (JUMP, 0, 0, len(below)), *below, *above]

    def code(self):
        """The instructions as bytes."""
        lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, self.arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
        lines += [(GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # the x32 twin of every call
        lines += self._search(sorted(self.blocks))
        return b"".join(struct.pack("<HBBI", *line) for line in lines)


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install(code):
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header = FilterProgram(len(code) // 8, code)
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0), "seccomp")


def known_calls():
    if platform.machine() not in SYSCALLS:
        raise OSError(f"no system-call table for {platform.machine()}")
    return SYSCALLS[platform.machine()]


def start_alone():
    """Like fork, into a pid namespace of its own: the new process is number 1 there, and there is no other.

    It needs CAP_SYS_ADMIN, which is how a worker can start processes and its calls cannot, under one filter.
    glibc is not asked, so its own note of the thread's number stays that of the caller: 1 as well, which is
    why only a worker that is number 1 of its namespace may call this.
    """
    flags = CLONE_NEWPID | signal.SIGCHLD
    pid = python.syscall(known_calls()["clone"], flags, 0, 0, 0, 0)
    if pid < 0:
        check(pid, "clone")
    return pid


def start_beside():
    """Fork, where no namespaces can be had. What os.fork sets up anew is as it should be in one thread."""
    return python.fork()


def end(pid):
    """SIGKILL to a child of this process that has not been waited for."""
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)


def common_rules(allow_writing):
    """What neither a worker nor any of its calls may do."""
    known = known_calls()
    rules = Rules(known["arch"])
    for number in (*known["denied"], *COMMON_DENIED):
        rules.deny(number)
    for number in NOT_THERE:
        rules.deny(number, ENOSYS)
    if not allow_writing:
        for number in known["writing"]:
            rules.deny(number, EACCES)
        for number, index in known["open"]:
            rules.on_argument(number, index, [(BITS, 0, 1, WRITE_FLAGS), (RETURN, 0, 0, ERRNO | EACCES)])
    return rules


def add_call_rules(rules, own_pid):
    """What a call may not do beside: reach for other processes."""
    known = known_calls()
    for number in known["oneself"]:
        rules.allow_values(number, 0, (own_pid,))
    rules.allow_values(known["prlimit"], 0, (0, own_pid))
    for number, index, values in known["options"]:
        rules.refuse_values(number, index, values)


def install_whole_filter():
    """For a worker whose calls start alone: one filter for all, in force before the first call. A process is
    started as a thread, or in a pid namespace of its own, which needs the capability that calls give up."""
    rules = common_rules(allow_writing=True)
    add_call_rules(rules, own_pid=1)
    known = known_calls()
    for number in known["forks"]:
        rules.deny(number)
    thread, alone, otherwise = (BITS, 2, 0, CLONE_THREAD), (BITS, 1, 0, CLONE_NEWPID), REFUSE
    rules.on_argument(known["clone"], 0, [(BITS, 2, 0, CLONE_NEWUSER), thread, alone, otherwise])
    install(rules.code())


def install_worker_filter(allow_writing):
    install(common_rules(allow_writing).code())


@functools.cache
def call_filter():
    """The second filter of a call that starts beside its worker. The call's own number stands in it as
    OWN_PID."""
    known = known_calls()
    rules = Rules(known["arch"])
    for number in (*known["forks"], *known["mounts"], *HANDLES):
        rules.deny(number)
    rules.on_argument(known["clone"], 0, [(BITS, 1, 0, CLONE_THREAD), REFUSE])
    add_call_rules(rules, OWN_PID)
    return rules.code()


def shut_call_in(report, alone, cpu_seconds):
    """The last doors, closed by a call's own process before it runs a tool; `report` says which there are."""
    limit_cpu(cpu_seconds)
    if report["root"] is True:
        os.chdir(SCRATCH)
    if report["capabilities"] is True:
        set_capabilities(0)
    if not alone:
        die_with_parent()
        if report["seccomp"] is True:
            install(call_filter().replace(struct.pack("<I", OWN_PID), struct.pack("<I", os.getpid())))


def try_step(report, name, step, *args):
    """Runs one protection and books under `name` whether it holds: True, or the reason it does not."""
    try:
        step(*args)
        report[name] = True
    except (OSError, AttributeError, KeyError, ValueError) as error:
        report[name] = str(error) or type(error).__name__
    return report[name] is True
