/*
 * The program of scripts/bench, static, in guests and on the host.
 *
 *   (none)        ends at once, which as /init is to power off
 *   serve         obeys lines on its console:
 *
 *     disk PATH OPERATION PATTERN SIZE DEPTH JOBS MS
 *                   with O_DIRECT "read"s or "write"s SIZE bytes at a time, "random" or
 *                   "sequential", DEPTH at once shared by JOBS threads, each on a CPU of its own
 *     stream-up ADDRESS PORT MS      sends bytes to a peer over TCP
 *     stream-down ADDRESS PORT MS    has a peer send bytes
 *     echo ADDRESS PORT MS           sends a byte and awaits its echo, again and again
 *     datagrams ADDRESS PORT MS      sends UDP datagrams of 64 bytes; those count that arrive
 *     inflate MIB MS     touches all free memory, and has the balloon's driver fill it with so much
 *     deflate MIB MS     has the driver let go what it has
 *     port-up PATH MS                writes bytes to a virtio-serial port that a peer reads
 *     port-down PATH MS              has a peer write bytes
 *     port-echo PATH MS              sends a byte and awaits its echo, again and again
 *
 *                   Each prints "start", works for MS milliseconds (inflates that
 *                   long at most), and prints "done COUNT MICROSECONDS". COUNT is of requests, bytes,
 *                   echoes or datagrams, and that of bytes and datagrams is the receiver's. "ready"
 *                   awaits a line.
 *
 *   peer ADDRESS  the other end on the host: prints "port PORT", and serves one connection after
 *                 the other until its stdin ends
 *   port-peer SOCKET    the other end of a port on the host: prints "ready" when it is connected, and
 *                       serves until its stdin ends
 *
 * What goes wrong is printed as "error: ...", and ends the program.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 256
#define MAX_JOBS 16
#define DEVICE_WAIT_MS 20000 /* SCSI disks are found in the background */
#define DATAGRAM_SIZE 64
#define BATCH 64
#define QUIET_MS 100 /* without a datagram: the last one has arrived */

/* As a child of a guest's init, and on the host, this program leaves the machine to others. */
static int is_init(void)
{
    return getpid() == 1;
}

static void end(int status)
{
    fflush(stdout);
    if (is_init())
        reboot(RB_POWER_OFF);
    _exit(status); /* of init: a panic, which cannot be taken for a power-off */
}

static void fail(const char *what)
{
    printf("error: %s: %s\n", what, strerror(errno));
    end(1);
}

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void done(uint64_t count, uint64_t microseconds)
{
    printf("done %llu %llu\n", (unsigned long long)count, (unsigned long long)microseconds);
}

/* Disks */

struct job {
    int fd;
    int is_write, is_random;
    unsigned index, depth;
    uint64_t size;        /* of a request */
    uint64_t first;       /* block of that size where sequential requests start */
    uint64_t blocks;      /* of that size on the disk */
    uint64_t seed;
    uint64_t duration_us; /* from the common start on */
    uint64_t count, elapsed_us;
};

static pthread_barrier_t all_are_ready;

/* xorshift64: the same blocks in each run. */
static uint64_t next_block(struct job *job)
{
    if (!job->is_random)
        return job->first++ % job->blocks;
    job->seed ^= job->seed << 13;
    job->seed ^= job->seed >> 7;
    job->seed ^= job->seed << 17;
    return job->seed % job->blocks;
}

static void submit(aio_context_t context, struct job *job, struct iocb **batch, long count)
{
    for (long index = 0; index < count; index++)
        batch[index]->aio_offset = (int64_t)(next_block(job) * job->size);
    for (long accepted = 0; accepted < count;) {
        long result = syscall(SYS_io_submit, context, count - accepted, batch + accepted);

        if (result <= 0)
            fail("io_submit");
        accepted += result;
    }
}

static void *run_job(void *argument)
{
    struct job *job = argument;
    struct iocb blocks[MAX_DEPTH], *batch[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    aio_context_t context = 0;
    uint64_t start;
    cpu_set_t cpus;
    char *buffers;

    CPU_ZERO(&cpus);
    CPU_SET(job->index, &cpus);
    if (sched_setaffinity(0, sizeof(cpus), &cpus))
        fail("a CPU for each job");
    if (syscall(SYS_io_setup, job->depth, &context))
        fail("io_setup");
    buffers = mmap(NULL, job->depth * job->size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffers == MAP_FAILED)
        fail("memory for the requests");
    memset(buffers, 0x5a, job->depth * job->size);
    for (unsigned index = 0; index < job->depth; index++) {
        blocks[index] = (struct iocb){
            .aio_lio_opcode = job->is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
            .aio_fildes = (uint32_t)job->fd,
            .aio_buf = (uintptr_t)(buffers + index * job->size),
            .aio_nbytes = job->size,
        };
        batch[index] = &blocks[index];
    }
    pthread_barrier_wait(&all_are_ready);
    start = now_us();
    submit(context, job, batch, job->depth);
    do {
        long count = syscall(SYS_io_getevents, context, 1, job->depth, events, NULL);

        if (count <= 0)
            fail("io_getevents");
        for (long index = 0; index < count; index++) {
            if (events[index].res != (int64_t)job->size) {
                errno = events[index].res < 0 ? (int)-events[index].res : EIO;
                fail("request to the disk");
            }
            batch[index] = (struct iocb *)(uintptr_t)events[index].obj;
        }
        job->count += (uint64_t)count;
        job->elapsed_us = now_us() - start;
        if (job->elapsed_us < job->duration_us)
            submit(context, job, batch, count);
    } while (job->elapsed_us < job->duration_us);
    /* Waits for the requests that are still on their way. */
    syscall(SYS_io_destroy, context);
    munmap(buffers, job->depth * job->size);
    return NULL;
}

/* Requests go to the device as they are made: neither sorted nor held back. Where the kernel has no
 * schedulers, that is so anyway. */
static void without_scheduler(const char *path)
{
    char name[64];
    int fd;

    snprintf(name, sizeof(name), "/sys/block/%s/queue/scheduler", path + strlen("/dev/"));
    fd = open(name, O_WRONLY);
    if (fd < 0 || write(fd, "none", 4) != 4)
        fail(name);
    close(fd);
}

static int open_disk(const char *path, int flags)
{
    for (unsigned waited = 0; access(path, F_OK) && waited < DEVICE_WAIT_MS; waited += 10)
        usleep(10000);
    without_scheduler(path);
    return open(path, flags | O_DIRECT | O_CLOEXEC);
}

static void disk(const char *arguments)
{
    struct job jobs[MAX_JOBS] = {0};
    pthread_t threads[MAX_JOBS];
    char path[32], operation[16], pattern[16];
    unsigned long long size, duration_ms;
    uint64_t disk_size, count = 0, elapsed_us = 0;
    unsigned depth, number;
    int fd, is_write;

    if (sscanf(arguments, "%31s %15s %15s %llu %u %u %llu", path, operation, pattern, &size, &depth,
               &number, &duration_ms) != 7) {
        errno = EINVAL;
        fail("command");
    }
    is_write = !strcmp(operation, "write");
    fd = open_disk(path, is_write ? O_WRONLY : O_RDONLY);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &disk_size))
        fail(path);
    if (!size || size > disk_size || !number || number > MAX_JOBS || depth < number ||
        depth > MAX_DEPTH) {
        errno = EINVAL;
        fail("command");
    }
    pthread_barrier_init(&all_are_ready, NULL, number + 1);
    for (unsigned index = 0; index < number; index++) {
        uint64_t blocks = disk_size / size;

        jobs[index] = (struct job){
            .fd = fd,
            .is_write = is_write,
            .is_random = !strcmp(pattern, "random"),
            .index = index,
            .depth = depth / number,
            .size = size,
            .first = blocks / number * index,
            .blocks = blocks,
            .seed = 88172645463325252u + index,
            .duration_us = duration_ms * 1000,
        };
        if (pthread_create(&threads[index], NULL, run_job, &jobs[index]))
            fail("thread");
    }
    printf("start\n");
    pthread_barrier_wait(&all_are_ready);
    for (unsigned index = 0; index < number; index++) {
        pthread_join(threads[index], NULL);
        count += jobs[index].count;
        if (elapsed_us < jobs[index].elapsed_us)
            elapsed_us = jobs[index].elapsed_us;
    }
    done(count, elapsed_us);
    pthread_barrier_destroy(&all_are_ready);
    close(fd);
}

/* Networks. A connection begins with a request of its client, the guest. What the peer counts it
 * says in a result when the client has shut its direction down. */

enum { STREAM_UP = 1, STREAM_DOWN, ECHO, DATAGRAMS };

struct request {
    uint32_t kind;
    uint32_t duration_ms;
};

struct result {
    uint64_t count;
    uint64_t microseconds;
};

static char payload[128 << 10];

static void send_all(int fd, const void *data, size_t size)
{
    for (const char *next = data; size;) {
        ssize_t sent = send(fd, next, size, MSG_NOSIGNAL);

        if (sent <= 0)
            fail("send");
        next += sent;
        size -= (size_t)sent;
    }
}

static void receive_all(int fd, void *data, size_t size)
{
    ssize_t received = recv(fd, data, size, MSG_WAITALL);

    if (received != (ssize_t)size) {
        errno = received < 0 ? errno : ECONNRESET;
        fail("recv");
    }
}

static uint64_t receive_to_end(int fd)
{
    uint64_t count = 0;
    ssize_t received;

    while ((received = recv(fd, payload, sizeof(payload), 0)) > 0)
        count += (uint64_t)received;
    if (received < 0)
        fail("recv");
    return count;
}

static void send_for(int fd, uint32_t duration_ms)
{
    for (uint64_t last = now_us() + duration_ms * 1000ull; now_us() < last;)
        send_all(fd, payload, sizeof(payload));
    if (shutdown(fd, SHUT_WR))
        fail("shutdown");
}

static void without_delay(int fd)
{
    int on = 1;

    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)))
        fail("TCP_NODELAY");
}

static struct mmsghdr *datagram_batch(size_t size)
{
    static struct iovec part;
    static struct mmsghdr batch[BATCH];

    part = (struct iovec){.iov_base = payload, .iov_len = size};
    for (unsigned index = 0; index < BATCH; index++)
        batch[index].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
    return batch;
}

static void send_datagrams(const struct sockaddr_in *to, uint32_t duration_ms)
{
    struct mmsghdr *batch = datagram_batch(DATAGRAM_SIZE);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || connect(fd, (const struct sockaddr *)to, sizeof(*to)))
        fail("UDP socket");
    for (uint64_t last = now_us() + duration_ms * 1000ull; now_us() < last;) {
        if (sendmmsg(fd, batch, BATCH, 0) < 0 && errno != ENOBUFS)
            fail("sendmmsg");
    }
    close(fd);
}

/* Datagrams until the client says that it has sent its last, and no more come. */
static struct result receive_datagrams(int udp, int connection)
{
    struct pollfd polled[] = {{.fd = udp, .events = POLLIN}, {.fd = connection, .events = POLLIN}};
    struct mmsghdr *batch = datagram_batch(sizeof(payload));
    struct result result = {0};
    uint64_t start;

    while (recvmmsg(udp, batch, BATCH, MSG_DONTWAIT, NULL) > 0)
        ; /* of an earlier client */
    send_all(connection, "", 1);
    start = now_us();
    for (;;) {
        int count = recvmmsg(udp, batch, BATCH, MSG_DONTWAIT, NULL);

        if (count > 0) {
            result.count += (uint64_t)count;
            result.microseconds = now_us() - start;
            continue;
        }
        count = poll(polled, 2, polled[1].fd < 0 ? QUIET_MS : -1);
        if (count < 0)
            fail("poll");
        if (count == 0)
            return result;
        if (polled[1].revents)
            polled[1].fd = -1;
    }
}

static void network(uint32_t kind, const char *arguments)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    struct request request = {.kind = kind};
    struct result result = {0};
    char address[32], byte = 0;
    unsigned port, duration_ms;
    uint64_t start;
    int fd;

    if (sscanf(arguments, "%31s %u %u", address, &port, &duration_ms) != 3 ||
        !inet_aton(address, &to.sin_addr)) {
        errno = EINVAL;
        fail("command");
    }
    to.sin_port = htons((uint16_t)port);
    request.duration_ms = duration_ms;
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)))
        fail("connection to the peer");
    without_delay(fd);
    printf("start\n");
    start = now_us();
    send_all(fd, &request, sizeof(request));
    switch (kind) {
    case STREAM_UP:
        send_for(fd, duration_ms);
        receive_all(fd, &result, sizeof(result));
        break;
    case STREAM_DOWN:
        result.count = receive_to_end(fd);
        break;
    case ECHO:
        for (uint64_t last = start + duration_ms * 1000ull; now_us() < last; result.count++) {
            send_all(fd, &byte, 1);
            receive_all(fd, &byte, 1);
        }
        break;
    case DATAGRAMS:
        receive_all(fd, &byte, 1);
        send_datagrams(&to, duration_ms);
        shutdown(fd, SHUT_WR);
        receive_all(fd, &result, sizeof(result));
        break;
    }
    done(result.count, kind == DATAGRAMS ? result.microseconds : now_us() - start);
    close(fd);
}

static void serve_connection(int fd, int udp)
{
    struct request request;
    struct result result = {0};

    without_delay(fd);
    receive_all(fd, &request, sizeof(request));
    switch (request.kind) {
    case STREAM_UP:
        result.count = receive_to_end(fd);
        send_all(fd, &result, sizeof(result));
        break;
    case STREAM_DOWN:
        send_for(fd, request.duration_ms);
        receive_to_end(fd); /* closing too early would reset the connection */
        break;
    case ECHO:
        for (char byte; recv(fd, &byte, 1, 0) == 1;)
            send_all(fd, &byte, 1);
        break;
    case DATAGRAMS:
        result = receive_datagrams(udp, fd);
        send_all(fd, &result, sizeof(result));
        break;
    }
    close(fd);
}

static void peer(const char *address)
{
    struct sockaddr_in own = {.sin_family = AF_INET};
    socklen_t length = sizeof(own);
    int buffer = 4 << 20;
    int tcp = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (!inet_aton(address, &own.sin_addr)) {
        errno = EINVAL;
        fail("address");
    }
    if (bind(tcp, (struct sockaddr *)&own, sizeof(own)) || listen(tcp, 8) ||
        getsockname(tcp, (struct sockaddr *)&own, &length) ||
        bind(udp, (struct sockaddr *)&own, sizeof(own)))
        fail("sockets");
    /* More than the limit for all takes rights; with less, datagrams may be lost. */
    if (setsockopt(udp, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof(buffer)))
        setsockopt(udp, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
    printf("port %u\n", ntohs(own.sin_port));
    for (;;) {
        struct pollfd polled[] = {{.fd = tcp, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
        int fd;

        if (poll(polled, 2, -1) < 0)
            fail("poll");
        if (polled[1].revents)
            end(0);
        fd = accept(tcp, NULL, NULL);
        if (fd < 0)
            fail("accept");
        serve_connection(fd, udp);
    }
}

/* The balloon, which goes by how its driver comes and leaves. */

#define BALLOON_DRIVER "/sys/bus/virtio/drivers/virtio_balloon"

/* A line of /proc/meminfo, in bytes. */
static uint64_t meminfo(const char *name)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/meminfo", "r");

    while (file && fgets(line, sizeof(line), file)) {
        if (!strncmp(line, name, strlen(name)) && sscanf(line + strlen(name), ": %llu", &kib) == 1)
            break;
    }
    if (!kib)
        fail(name);
    fclose(file);
    return kib << 10;
}

static void touch_free_memory(void)
{
    uint64_t size = meminfo("MemAvailable") - (24 << 20);
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        fail("memory to touch");
    memset(memory, 0x5a, size);
    munmap(memory, size);
}

/* Writes the name of the device, which the driver has at first, to a file of the driver. */
static void tell_driver(const char *what)
{
    static char device[32];
    char path[64], link[64];
    int fd;

    for (unsigned index = 0; !device[0] && index < 32; index++) {
        snprintf(link, sizeof(link), BALLOON_DRIVER "/virtio%u", index);
        if (!access(link, F_OK))
            snprintf(device, sizeof(device), "virtio%u", index);
    }
    snprintf(path, sizeof(path), BALLOON_DRIVER "/%s", what);
    fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, device, strlen(device)) < 0)
        fail(path);
    close(fd);
}

static void balloon(int inflate, const char *arguments)
{
    unsigned long long mib, limit_ms;
    uint64_t start, before;

    if (sscanf(arguments, "%llu %llu", &mib, &limit_ms) != 2 || !mib) {
        errno = EINVAL;
        fail("command");
    }
    if (inflate)
        touch_free_memory();
    printf("start\n");
    before = meminfo("MemTotal");
    start = now_us();
    tell_driver(inflate ? "bind" : "unbind");
    if (!inflate) { /* it empties before it leaves */
        uint64_t elapsed = now_us() - start;

        done(meminfo("MemTotal") - before, elapsed);
        return;
    }
    do { /* it fills in the background */
        if (before - meminfo("MemTotal") >= mib << 20) {
            done(mib << 20, now_us() - start);
            return;
        }
        usleep(2000);
    } while (now_us() - start < limit_ms * 1000);
    errno = ETIMEDOUT;
    fail("balloon");
}

/* Ports of virtio-serial. Streams are of zeroes up to a LAST: closing a port ends nothing. */

enum { LAST = 1, PORT_WRITE = 32 << 10 }; /* that much Linux takes of one write */

static void write_all(int fd, const void *data, size_t size)
{
    for (const char *next = data; size;) {
        ssize_t written = write(fd, next, size);

        if (written <= 0)
            fail("write to the port");
        next += written;
        size -= (size_t)written;
    }
}

static void read_all(int fd, void *data, size_t size)
{
    for (char *next = data; size;) {
        ssize_t got = read(fd, next, size);

        if (got <= 0) {
            errno = got < 0 ? errno : ECONNRESET;
            fail("read from the port");
        }
        next += got;
        size -= (size_t)got;
    }
}

static void write_stream(int fd, uint32_t duration_ms)
{
    static const char last = LAST;

    for (uint64_t end_us = now_us() + duration_ms * 1000ull; now_us() < end_us;)
        write_all(fd, payload, PORT_WRITE);
    write_all(fd, &last, 1);
}

static uint64_t read_stream(int fd)
{
    static char data[128 << 10];
    uint64_t count = 0;
    ssize_t got;

    do {
        got = read(fd, data, sizeof(data));
        if (got <= 0) {
            errno = got < 0 ? errno : ECONNRESET;
            fail("read from the port");
        }
        count += (uint64_t)got;
    } while (data[got - 1] != LAST);
    return count;
}

static void port(uint32_t kind, const char *arguments)
{
    struct request request = {.kind = kind};
    struct result result = {0};
    unsigned duration_ms;
    char path[64], byte = 0;
    uint64_t start;
    int fd = -1;

    if (sscanf(arguments, "%63s %u", path, &duration_ms) != 2) {
        errno = EINVAL;
        fail("command");
    }
    request.duration_ms = duration_ms;
    for (unsigned waited = 0; fd < 0; waited += 10) {
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0 && waited > DEVICE_WAIT_MS)
            fail(path);
        if (fd < 0)
            usleep(10000);
    }
    printf("start\n");
    start = now_us();
    write_all(fd, &request, sizeof(request));
    switch (kind) {
    case STREAM_UP:
        write_stream(fd, duration_ms);
        read_all(fd, &result, sizeof(result));
        break;
    case STREAM_DOWN:
        result.count = read_stream(fd);
        break;
    case ECHO:
        for (uint64_t end_us = start + duration_ms * 1000ull; now_us() < end_us; result.count++) {
            write_all(fd, &byte, 1);
            read_all(fd, &byte, 1);
        }
        byte = LAST;
        write_all(fd, &byte, 1);
        break;
    }
    done(result.count, now_us() - start);
    close(fd);
}

static void *end_with_stdin(void *unused)
{
    char byte;

    while (read(0, &byte, 1) > 0)
        ;
    end(0);
    return unused;
}

static void port_peer(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    pthread_t thread;

    strncpy(to.sun_path, path, sizeof(to.sun_path) - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)))
        fail("connection to the port");
    if (pthread_create(&thread, NULL, end_with_stdin, NULL))
        fail("thread");
    printf("ready\n");
    for (;;) {
        struct request request;
        struct result result = {0};
        char byte = 0;

        read_all(fd, &request, sizeof(request));
        switch (request.kind) {
        case STREAM_UP:
            result.count = read_stream(fd);
            write_all(fd, &result, sizeof(result));
            break;
        case STREAM_DOWN:
            write_stream(fd, request.duration_ms);
            break;
        case ECHO:
            for (read_all(fd, &byte, 1); byte != LAST; read_all(fd, &byte, 1))
                write_all(fd, &byte, 1);
            break;
        }
    }
}

static const struct {
    const char *name;
    uint32_t kind;
    void (*run)(uint32_t kind, const char *arguments);
} connections[] = {
    {"stream-up ", STREAM_UP, network},
    {"stream-down ", STREAM_DOWN, network},
    {"echo ", ECHO, network},
    {"datagrams ", DATAGRAMS, network},
    {"port-up ", STREAM_UP, port},
    {"port-down ", STREAM_DOWN, port},
    {"port-echo ", ECHO, port},
};

static int obey(const char *line)
{
    if (!strncmp(line, "disk ", 5)) {
        disk(line + 5);
        return 1;
    }
    if (!strncmp(line, "inflate ", 8) || !strncmp(line, "deflate ", 8)) {
        balloon(line[0] == 'i', line + 8);
        return 1;
    }
    for (unsigned index = 0; index < sizeof(connections) / sizeof(connections[0]); index++) {
        size_t length = strlen(connections[index].name);

        if (!strncmp(line, connections[index].name, length)) {
            connections[index].run(connections[index].kind, line + length);
            return 1;
        }
    }
    return 0;
}

static void serve(void)
{
    char line[256];

    if (is_init() && ((mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) && errno != EBUSY) ||
                      mount("sysfs", "/sys", "sysfs", 0, NULL)))
        fail("mount of /dev and /sys");
    printf("ready\n");
    while (fgets(line, sizeof(line), stdin)) {
        if (!obey(line)) {
            errno = EINVAL;
            fail("command");
        }
        printf("ready\n");
    }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 2 && !strcmp(argv[1], "peer"))
        peer(argv[2]);
    if (argc > 2 && !strcmp(argv[1], "port-peer"))
        port_peer(argv[2]);
    if (argc > 1 && !strcmp(argv[1], "serve"))
        serve();
    end(0);
}
