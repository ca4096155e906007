/* PID 1 of the emulated machine: it makes the machine look like the host and runs one command.
 *
 * Statically linked and alone in the initramfs, so that under TCG nothing but the kernel stands
 * between the start of QEMU and the command. Under the name "modprobe" it is also the kernel's
 * module loader: most modules are loaded when something first asks for them.
 */
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <linux/kvm.h>
#include <net/if.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "nested_protocol.h"

#define MODULE_DIR "/pyvmm"
#define MODULE_DIR_INSIDE "/run/pyvmm"
#define MODULE_INDEX "index"
#define START_MESSAGE_MAX (8u << 20)
#define PUMP_SIZE 65536

/* ---- failures: the console is all the host can read before the control port works ---- */

static void power_off(void)
{
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void __attribute__((format(printf, 1, 2), noreturn)) die(const char *format, ...)
{
    int error = errno;
    va_list arguments;

    va_start(arguments, format);
    dprintf(STDERR_FILENO, "pyvmm-init: ");
    vdprintf(STDERR_FILENO, format, arguments);
    dprintf(STDERR_FILENO, ": %s\n", strerror(error));
    va_end(arguments);
    power_off();
    __builtin_unreachable();
}

/* ---- kernel modules ---- */

/* The index, made by pyvmm.nested.bundle, holds one directive a line:
 *   load FILE [PARAMETER...]         at boot
 *   alias PATTERN FILE...            when the kernel or a user asks for PATTERN; in this order
 *   node NAME MAJOR MINOR            device node whose first open loads its module
 */
static FILE *open_index(const char *directory)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/%s", directory, MODULE_INDEX);
    return fopen(path, "re");
}

static int load_module(const char *directory, const char *file, const char *parameters)
{
    char path[256];
    int fd, result;

    snprintf(path, sizeof(path), "%s/%s", directory, file);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    result = (int)syscall(SYS_finit_module, fd, parameters, 0);
    close(fd);
    return result < 0 && errno != EEXIST ? -1 : 0;
}

static void load_boot_modules_and_make_nodes(void)
{
    FILE *index = open_index(MODULE_DIR);
    char *line = NULL, path[128], name[96];
    unsigned int major_number, minor_number;
    size_t size = 0;

    if (!index)
        die(MODULE_DIR "/" MODULE_INDEX);
    while (getline(&line, &size, index) > 0) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "load ", 5)) {
            char *file = line + 5, *parameters = strchr(file, ' ');

            if (parameters)
                *parameters++ = 0;
            if (load_module(MODULE_DIR, file, parameters ? parameters : ""))
                die("module %s", file);
        } else if (sscanf(line, "node %95s %u %u", name, &major_number, &minor_number) == 3) {
            char *slash = strrchr(name, '/');

            if (slash) {
                snprintf(path, sizeof(path), "/dev/%.*s", (int)(slash - name), name);
                mkdir(path, 0755);
            }
            snprintf(path, sizeof(path), "/dev/%s", name);
            mknod(path, S_IFCHR | 0666, makedev(major_number, minor_number));
            chmod(path, 0666);
        }
    }
    free(line);
    fclose(index);
}

/* "modprobe [-OPTION]... NAME [PARAMETER...]": the parameters go to the last file, NAME's own. */
static int modprobe_main(int argc, char **argv)
{
    const char *directory = access(MODULE_DIR, F_OK) ? MODULE_DIR_INSIDE : MODULE_DIR;
    char parameters[1024] = "", *line = NULL, *pattern, *file, *next, *state;
    size_t size = 0;
    int first = 1, status = 1;
    FILE *index = open_index(directory);

    while (first < argc && argv[first][0] == '-')
        first++;
    if (!index || first >= argc)
        return 1;
    for (int i = first + 1; i < argc; i++) {
        size_t used = strlen(parameters);

        snprintf(parameters + used, sizeof(parameters) - used, "%s ", argv[i]);
    }
    while (getline(&line, &size, index) > 0) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "alias ", 6))
            continue;
        pattern = strtok_r(line + 6, " ", &state);
        if (!pattern || fnmatch(pattern, argv[first], 0))
            continue;
        status = 0;
        for (file = strtok_r(NULL, " ", &state); file; file = next) {
            next = strtok_r(NULL, " ", &state);
            if (load_module(directory, file, next ? "" : parameters)) {
                fprintf(stderr, "modprobe: %s: %s\n", file, strerror(errno));
                status = 1;
            }
        }
        break;
    }
    free(line);
    fclose(index);
    return status;
}

/* ---- the machine ---- */

/* KVM's static keys follow its VMs: the first one and the last one, each vCPU without a local APIC,
 * and each vCPU whose local APIC its guest has not enabled yet, so that every boot of a guest patches
 * the code of kvm.ko twice. QEMU's TCG loses the kernel now and then over that ("Oops: int3", or a
 * jump into nowhere). A vCPU of either kind that stays open for the machine's whole life leaves a
 * single patch of each, at a time when nothing else runs. */
static void hold_vcpu(int kvm, bool local_apic)
{
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu;

    if (vm < 0)
        die("KVM_CREATE_VM");
    if (local_apic && ioctl(vm, KVM_CREATE_IRQCHIP, 0))
        die("KVM_CREATE_IRQCHIP");
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (vcpu < 0)
        die("KVM_CREATE_VCPU");
    fcntl(vm, F_SETFD, FD_CLOEXEC);
    fcntl(vcpu, F_SETFD, FD_CLOEXEC);
}

static void hold_kvm_open(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (kvm < 0)
        die("/dev/kvm");
    hold_vcpu(kvm, false);
    hold_vcpu(kvm, true);
}

/* The kernel starts with one CPU (maxcpus=1), so that all the code it patches on its way up, and
 * all of the above, is patched while no other CPU can execute it. */
static void bring_up_cpus(void)
{
    char path[64];
    int fd;

    for (int cpu = 1;; cpu++) {
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
        fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            break;
        if (write(fd, "1", 1) != 1)
            die("%s", path);
        close(fd);
    }
}

static void must_mount(const char *source, const char *target, const char *type,
                       unsigned long flags, const char *options)
{
    if (mount(source, target, type, flags, options))
        die("mount %s on %s", source, target);
}

static void mount_early(void)
{
    mkdir("/dev", 0755);
    mkdir("/host", 0755);
    mkdir("/sys", 0755);
    must_mount("sysfs", "/sys", "sysfs", 0, NULL);
    must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
}

/* The host's root with this machine's own kernel file systems over it. MS_MOVE lays it over the
 * initramfs for every process that calls chroot("."); PID 1 stays below, where the kernel finds
 * /sbin/modprobe. */
static void mount_host_root(void)
{
    must_mount("host", "/host", "virtiofs", 0, NULL);
    must_mount("proc", "/host/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    must_mount("sysfs", "/host/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    must_mount("devtmpfs", "/host/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    mkdir("/host/dev/pts", 0755);
    mkdir("/host/dev/shm", 01777);
    must_mount("devpts", "/host/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
    must_mount("/host/dev/pts", "/dev/pts", NULL, MS_BIND, NULL);
    must_mount("tmpfs", "/host/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=90%");
    must_mount("tmpfs", "/host/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    mkdir("/host/run/lock", 01777);
    mkdir("/host" MODULE_DIR_INSIDE, 0755);
    must_mount(MODULE_DIR, "/host" MODULE_DIR_INSIDE, NULL, MS_BIND, NULL);
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");
    unlink("/dev/ptmx");
    symlink("pts/ptmx", "/dev/ptmx");
    if (chdir("/host"))
        die("/host");
    must_mount(".", "/", NULL, MS_MOVE, NULL);
}

static void bring_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request))
        die("loopback interface");
    close(fd);
}

/* ---- ports ---- */

static int ports[PORT_TERMINAL + 1];

static void open_ports(void)
{
    char path[32];

    for (int number = PORT_CONTROL; number <= PORT_TERMINAL; number++) {
        snprintf(path, sizeof(path), "/dev/vport0p%d", number);
        /* The device announces its ports one after another once the driver is ready. */
        for (int attempt = 0; attempt < 10000; attempt++) {
            ports[number] = open(path, O_RDWR | O_CLOEXEC);
            if (ports[number] >= 0 || errno != ENOENT)
                break;
            usleep(1000);
        }
        if (ports[number] < 0)
            die("%s", path);
    }
}

/* Blocking, as the host always reads the control port: records are small and rare. */
static void send_record(const struct nested_record *record)
{
    if (write(ports[PORT_CONTROL], record, sizeof(*record)) != sizeof(*record))
        power_off();
}

static void receive_exactly(void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = read(ports[PORT_CONTROL], (char *)data + done, size - done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) /* the host closed its side: nobody is left to work for */
            power_off();
        done += (size_t)got;
    }
}

/* ---- the command ---- */

struct command {
    unsigned int terminals; /* bit N: file descriptor N of the command is the terminal */
    bool raw;               /* the host's terminal is raw, so this side edits and echoes lines */
    struct winsize window;
    unsigned int umask;
    const char *hostname;
    const char *directory;
    char **argv;
    char **environment;
};

struct parser {
    char *at;
    char *end;
};

static char *parse_string(struct parser *parser)
{
    char *text = parser->at;
    char *stop = memchr(text, 0, (size_t)(parser->end - text));

    errno = EBADMSG;
    if (!stop)
        die("start message");
    parser->at = stop + 1;
    return text;
}

static unsigned long parse_number(struct parser *parser)
{
    return strtoul(parse_string(parser), NULL, 10);
}

static char **parse_list(struct parser *parser)
{
    size_t count = parse_number(parser);
    char **list = calloc(count + 1, sizeof(*list));

    if (!list)
        die("start message");
    for (size_t i = 0; i < count; i++)
        list[i] = parse_string(parser);
    return list;
}

/* The strings stay in the message, which is never freed. */
static struct command receive_command(void)
{
    struct command command = {0};
    struct parser parser;
    struct timespec now;
    uint32_t size;

    receive_exactly(&size, sizeof(size));
    errno = EMSGSIZE;
    if (size > START_MESSAGE_MAX || !(parser.at = malloc(size)))
        die("start message of %u bytes", size);
    parser.end = parser.at + size;
    receive_exactly(parser.at, size);

    now.tv_sec = (time_t)parse_number(&parser);
    now.tv_nsec = (long)parse_number(&parser);
    clock_settime(CLOCK_REALTIME, &now);
    command.terminals = (unsigned int)parse_number(&parser);
    command.raw = parse_number(&parser);
    command.window.ws_row = (unsigned short)parse_number(&parser);
    command.window.ws_col = (unsigned short)parse_number(&parser);
    command.umask = (unsigned int)parse_number(&parser);
    command.hostname = parse_string(&parser);
    command.directory = parse_string(&parser);
    command.argv = parse_list(&parser);
    command.environment = parse_list(&parser);
    return command;
}

static void __attribute__((noreturn)) exec_command(const struct command *command)
{
    struct rlimit files = {65536, 1048576};
    sigset_t none;
    int error;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setrlimit(RLIMIT_NOFILE, &files);
    umask((mode_t)command->umask);
    error = chroot(".") || chdir(command->directory);
    if (error) {
        fprintf(stderr, "pyvmm nested: %s: %s\n", command->directory, strerror(errno));
        _exit(126);
    }
    environ = command->environment;
    execvp(command->argv[0], command->argv);
    error = errno;
    fprintf(stderr, "pyvmm nested: %s: %s\n", command->argv[0], strerror(error));
    _exit(error == ENOENT ? 127 : 126);
}

/* Our ends of the command's file descriptors 0 to 2 and of its terminal; -1 where there is none. */
struct channels {
    int standard[3];
    int terminal;
};

static pid_t start_command(const struct command *command, struct channels *channels)
{
    int inner[3] = {-1, -1, -1}, pair[2], slave = -1;
    pid_t child;

    channels->terminal = -1;
    if (command->terminals) {
        if (openpty(&channels->terminal, &slave, NULL, NULL, &command->window))
            die("openpty");
        if (!command->raw) {
            struct termios settings;

            tcgetattr(slave, &settings);
            settings.c_oflag &= ~(tcflag_t)OPOST;
            settings.c_lflag &= ~(tcflag_t)ECHO;
            tcsetattr(slave, TCSANOW, &settings);
        }
    }
    for (int fd = 0; fd < 3; fd++) {
        channels->standard[fd] = -1;
        if (command->terminals & (1u << fd)) {
            inner[fd] = slave;
            continue;
        }
        if (pipe2(pair, O_CLOEXEC))
            die("pipe");
        inner[fd] = pair[fd == 0 ? 0 : 1];
        channels->standard[fd] = pair[fd == 0 ? 1 : 0];
        fcntl(channels->standard[fd], F_SETFL, O_NONBLOCK);
    }
    child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        setsid();
        if (slave >= 0)
            ioctl(slave, TIOCSCTTY, 0);
        for (int fd = 0; fd < 3; fd++)
            dup2(inner[fd], fd);
        for (int fd = 3; fd < 256; fd++)
            close(fd);
        exec_command(command);
    }
    for (int fd = 0; fd < 3; fd++)
        if (inner[fd] != slave)
            close(inner[fd]);
    if (slave >= 0) {
        close(slave);
        fcntl(channels->terminal, F_SETFL, O_NONBLOCK);
        fcntl(channels->terminal, F_SETFD, FD_CLOEXEC);
    }
    return child;
}

/* ---- moving bytes ---- */

/* Copies one stream. It reads only when its buffer is empty, so a slow reader holds up its writer
 * and nothing else. */
struct pump {
    int from; /* -1: the source has ended */
    int to;   /* -1: nobody wants the data; it is read and dropped */
    size_t start;
    size_t end;
    uint64_t sent;
    uint64_t limit; /* the source ends after so many bytes */
    bool close_at_end;
    char buffer[PUMP_SIZE];
};

enum { PUMP_STDIN, PUMP_STDOUT, PUMP_STDERR, PUMP_TYPED, PUMP_SHOWN, PUMP_COUNT };
static struct pump pumps[PUMP_COUNT];

static void pump_init(struct pump *pump, int from, int to)
{
    pump->from = to < 0 ? -1 : from;
    pump->to = from < 0 ? -1 : to;
    pump->limit = UINT64_MAX;
}

static bool pump_is_idle(const struct pump *pump)
{
    return pump->from < 0 && pump->start == pump->end;
}

static void pump_stop_writing(struct pump *pump)
{
    if (pump->close_at_end && pump->to >= 0)
        close(pump->to);
    pump->to = -1;
    pump->start = pump->end;
}

static void pump_check_limit(struct pump *pump)
{
    if (pump->sent >= pump->limit && pump->start == pump->end) {
        pump->from = -1;
        pump_stop_writing(pump);
    }
}

static short pump_wants(const struct pump *pump, int fd)
{
    short events = 0;

    if (fd == pump->from && pump->start == pump->end)
        events |= POLLIN;
    if (fd == pump->to && pump->start < pump->end)
        events |= POLLOUT;
    return events;
}

static void pump_run(struct pump *pump)
{
    ssize_t count;

    if (pump->start == pump->end && pump->from >= 0) {
        count = read(pump->from, pump->buffer, sizeof(pump->buffer));
        if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR))
            pump->from = -1; /* end of the pipe; EIO: nobody holds the terminal any more */
        if (count > 0) {
            pump->start = 0;
            pump->end = (size_t)count;
        }
    }
    while (pump->start < pump->end) {
        if (pump->to < 0) {
            pump->sent += pump->end - pump->start;
            pump->start = pump->end;
            break;
        }
        count = write(pump->to, pump->buffer + pump->start, pump->end - pump->start);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (count < 0) {
            pump_stop_writing(pump);
            break;
        }
        pump->start += (size_t)count;
        pump->sent += (uint64_t)count;
    }
    pump_check_limit(pump);
}

/* ---- the session ---- */

static void handle_record(const struct nested_record *record, pid_t child, int terminal)
{
    switch (record->kind) {
    case KIND_SIGNAL:
        if (child > 0)
            kill(-child, (int)record->value);
        break;
    case KIND_WINDOW: {
        struct winsize window = {
            .ws_row = (unsigned short)record->count[0],
            .ws_col = (unsigned short)record->count[1],
        };

        ioctl(terminal, TIOCSWINSZ, &window);
        break;
    }
    case KIND_END:
        pumps[PUMP_STDIN].limit = record->count[0];
        pump_check_limit(&pumps[PUMP_STDIN]);
        break;
    case KIND_CLOSED: {
        struct pump *pump = &pumps[record->value == PORT_STDOUT ? PUMP_STDOUT : PUMP_STDERR];

        if (pump->from >= 0)
            close(pump->from); /* so that the command gets SIGPIPE */
        pump->from = -1;
        pump->start = pump->end;
        break;
    }
    default:
        break;
    }
}

/* Reaps every child; returns the command's wait status once it has ended, else -1. */
static int reap(pid_t child)
{
    int status, result = -1;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == child)
            result = status;
    return result;
}

static int64_t milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool outputs_are_drained(void)
{
    return pump_is_idle(&pumps[PUMP_STDOUT]) && pump_is_idle(&pumps[PUMP_STDERR]) &&
           pump_is_idle(&pumps[PUMP_SHOWN]);
}

/* Runs until the command has ended and all that it wrote has gone out; returns its wait status. */
static int serve(pid_t child, const struct channels *channels, int signals)
{
    struct pollfd polled[2 + 2 * PUMP_COUNT] = {
        {.fd = ports[PORT_CONTROL], .events = POLLIN},
        {.fd = signals, .events = POLLIN},
    };
    const struct nested_record alive = {.kind = KIND_ALIVE};
    int64_t next_beat = milliseconds() + HEARTBEAT_MS;
    struct signalfd_siginfo info;
    struct nested_record record;
    int status = -1;

    pump_init(&pumps[PUMP_STDIN], ports[PORT_STDIN], channels->standard[0]);
    pump_init(&pumps[PUMP_STDOUT], channels->standard[1], ports[PORT_STDOUT]);
    pump_init(&pumps[PUMP_STDERR], channels->standard[2], ports[PORT_STDERR]);
    pump_init(&pumps[PUMP_TYPED], ports[PORT_TERMINAL], channels->terminal);
    pump_init(&pumps[PUMP_SHOWN], channels->terminal, ports[PORT_TERMINAL]);
    pumps[PUMP_STDIN].close_at_end = true;

    while (status < 0 || !outputs_are_drained()) {
        int64_t now = milliseconds();

        if (now >= next_beat) {
            send_record(&alive);
            next_beat = now + HEARTBEAT_MS;
        }
        for (int i = 0; i < PUMP_COUNT; i++) {
            struct pollfd *source = &polled[2 + 2 * i], *target = source + 1;

            source->events = pump_wants(&pumps[i], pumps[i].from);
            source->fd = source->events ? pumps[i].from : -1;
            target->events = pump_wants(&pumps[i], pumps[i].to);
            target->fd = target->events ? pumps[i].to : -1;
        }
        if (poll(polled, sizeof(polled) / sizeof(*polled), (int)(next_beat - now)) < 0 &&
            errno != EINTR)
            die("poll");
        if (polled[0].revents) {
            receive_exactly(&record, sizeof(record));
            handle_record(&record, status < 0 ? child : 0, channels->terminal);
        }
        if (polled[1].revents && read(signals, &info, sizeof(info)) > 0 && status < 0) {
            status = reap(child);
            /* The command was the reason for this machine: what it left running ends with it, and
             * so every pipe reaches its end. */
            if (status >= 0)
                kill(-1, SIGKILL);
        } else if (status >= 0) {
            reap(child);
        }
        for (int i = 0; i < PUMP_COUNT; i++)
            pump_run(&pumps[i]);
    }
    return status;
}

int main(int argc, char **argv)
{
    const char *name = strrchr(argv[0], '/');
    struct nested_record record = {.kind = KIND_HELLO};
    struct channels channels;
    struct command command;
    sigset_t blocked;
    int signals;
    pid_t child;

    if (!strcmp(name ? name + 1 : argv[0], "modprobe"))
        return modprobe_main(argc, argv);

    mount_early();
    load_boot_modules_and_make_nodes();
    hold_kvm_open();
    bring_up_cpus();
    mount_host_root();
    bring_up_loopback();
    open_ports();
    /* From here on all that can fail is the command's: the host never starts a second machine for
     * a command that may have run. */
    send_record(&record);
    command = receive_command();
    sethostname(command.hostname, strlen(command.hostname));
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    signal(SIGPIPE, SIG_IGN);
    signals = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK);
    child = start_command(&command, &channels);
    for (int port = PORT_STDIN; port <= PORT_TERMINAL; port++)
        fcntl(ports[port], F_SETFL, O_NONBLOCK);

    record.value = (uint32_t)serve(child, &channels, signals);
    record.kind = KIND_EXIT;
    record.count[0] = pumps[PUMP_STDOUT].sent;
    record.count[1] = pumps[PUMP_STDERR].sent;
    record.count[2] = pumps[PUMP_SHOWN].sent;
    send_record(&record);
    for (;;) /* the host stops the machine when it has all; or it is gone, and the read says so */
        receive_exactly(&record, sizeof(record));
}
