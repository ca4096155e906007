#include "slirp_net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <poll.h>
#include <slirp/libslirp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

#define HEADER sizeof(struct virtio_net_hdr_v1)
/* An Ethernet header and the longest IP packet there is. */
#define FRAME_MAX (ETH_HLEN + 65535)

/* So many frames of the guest are taken at a time. */
#define BATCH 16

/* Small frames for the guest are collected for one system call; a large one is sent as it is, since
 * copying it costs more than a call. */
#define COLLECT_MAX 2048
#define COLLECT_FRAMES 64
/* The queue of frames that the guest has no room for. One event of a socket brings at most the send
 * buffer of one connection, 128 KiB, and no further event is taken before the queue is empty. */
#define QUEUE_FRAMES 1024
#define QUEUE_BYTES (1024 * 1024)

/* A forwarded port's backlog; libslirp's own, of 1, makes clients that come together wait for
 * retransmissions. */
#define BACKLOG 128

struct timer {
    struct timer *next;
    SlirpTimerCb expired;
    void *opaque;
    int64_t expires; /* ms; INT64_MAX: not set */
};

struct slirp_net {
    Slirp *slirp;
    int fd;
    int stop_fd;
    uint16_t mtu;
    struct timer *timers;
    struct slirp_net_counters counters;

    struct pollfd *pollfds; /* stop_fd, fd, and then those of the stack */
    int pollfd_count, pollfd_capacity;
    /* Sockets get their turn by index. A full queue ends a round early, at `cut` (or -1); the next
     * one then starts there, at `first`, so that no socket is always the one that is left out. */
    int first, cut;

    /* From the guest: taken off the socket, the first `next` of them already fed to the stack. */
    int received, next;
    struct mmsghdr in[BATCH];
    struct iovec in_iov[BATCH][2];
    struct virtio_net_hdr_v1 in_header;
    uint8_t (*in_frames)[FRAME_MAX];

    /* To the guest. `blocked`: its socket is full. */
    bool blocked;
    struct virtio_net_hdr_v1 out_header;
    int queued, sent; /* frames in `out`, and those of them that are on their way */
    size_t queue_bytes;
    struct mmsghdr out[QUEUE_FRAMES];
    struct iovec out_iov[QUEUE_FRAMES][2];
    uint8_t *queue;
};

static int64_t now_ns(void *opaque)
{
    struct timespec time;

    (void)opaque;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int64_t now_ms(void)
{
    return now_ns(NULL) / 1000000;
}

/* To the guest */

static bool is_full(int error)
{
    /* ENOBUFS: the kernel is short of memory, which is over as suddenly. */
    return error == EAGAIN || error == ENOBUFS;
}

static void flush(struct slirp_net *net)
{
    while (net->sent < net->queued) {
        int count = sendmmsg(net->fd, net->out + net->sent, (unsigned)(net->queued - net->sent),
                             MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0) {
            net->blocked = is_full(errno);
            if (net->blocked)
                return;
            break; /* nobody is there any more */
        }
        net->sent += count;
    }
    net->blocked = false;
    net->queued = net->sent = 0;
    net->queue_bytes = 0;
}

/* libslirp's DHCP server has no option for the MTU, which guests without VIRTIO_NET_F_MTU learn of
 * in no other way: put in behind those that it gives, into the padding of the message (RFC 2131,
 * 2132). `frame` is one of the stack's, in the queue. */
static void add_dhcp_mtu(const struct slirp_net *net, uint8_t *frame, size_t size)
{
    enum { IP = ETH_HLEN, UDP = IP + 20, OPTIONS = UDP + 8 + 240 };
    enum { OPTION_PAD = 0, OPTION_MTU = 26, OPTION_END = 255 };
    const uint8_t server_port[] = {0, 67};
    const uint8_t option[] = {OPTION_MTU, 2, net->mtu >> 8, net->mtu & 0xff, OPTION_END};
    size_t at = OPTIONS;

    if (size < OPTIONS || frame[12] != 0x08 || frame[13] != 0x00 || frame[IP] != 0x45 ||
        frame[IP + 9] != IPPROTO_UDP || memcmp(frame + UDP, server_port, sizeof(server_port)) != 0)
        return;
    while (at + 1 < size && frame[at] != OPTION_END)
        at += frame[at] == OPTION_PAD ? 1 : 2u + frame[at + 1];
    if (at + sizeof(option) > size)
        return;
    memcpy(frame + at, option, sizeof(option));
    memset(frame + UDP + 6, 0, 2); /* the checksum: none (RFC 768) */
}

static void enqueue(struct slirp_net *net, const void *frame, size_t size)
{
    if (net->queued == QUEUE_FRAMES || size > QUEUE_BYTES - net->queue_bytes) {
        net->counters.dropped++;
        return;
    }
    uint8_t *place = net->queue + net->queue_bytes;
    memcpy(place, frame, size);
    add_dhcp_mtu(net, place, size);
    net->queue_bytes += size;
    net->out_iov[net->queued++][1] = (struct iovec){place, size};
}

static ssize_t send_packet(const void *frame, size_t size, void *opaque)
{
    struct slirp_net *net = opaque;

    net->counters.to_guest++;
    if (size > COLLECT_MAX && !net->blocked) {
        struct iovec iov[2] = {
            {&net->out_header, HEADER},
            {(void *)frame, size},
        };
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
        flush(net);
        if (!net->blocked) {
            if (sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 || !is_full(errno))
                return (ssize_t)size;
            net->blocked = true;
        }
    }
    enqueue(net, frame, size);
    if (!net->blocked && net->queued >= COLLECT_FRAMES)
        flush(net);
    return (ssize_t)size;
}

/* From the guest */

static void receive(struct slirp_net *net)
{
    int count = recvmmsg(net->fd, net->in, BATCH, MSG_DONTWAIT, NULL);

    net->next = 0;
    net->received = count < 0 ? 0 : count;
}

static bool is_acceptable(const struct mmsghdr *message, const uint8_t *frame)
{
    if ((message->msg_hdr.msg_flags & MSG_TRUNC) || message->msg_len < HEADER + ETH_HLEN)
        return false;
    uint16_t type = (uint16_t)(frame[12] << 8 | frame[13]);
    return type == ETHERTYPE_ARP || type == ETHERTYPE_IP || type == ETHERTYPE_IPV6;
}

static void feed(struct slirp_net *net)
{
    while (net->next < net->received && !net->blocked) {
        const struct mmsghdr *message = &net->in[net->next];
        const uint8_t *frame = net->in_frames[net->next];

        net->next++;
        net->counters.from_guest++;
        if (is_acceptable(message, frame))
            slirp_input(net->slirp, frame, (int)(message->msg_len - HEADER));
        else
            net->counters.malformed++;
    }
}

/* The stack's timers and sockets */

static void *timer_new(SlirpTimerCb expired, void *timer_opaque, void *opaque)
{
    struct slirp_net *net = opaque;
    struct timer *timer = malloc(sizeof(*timer));

    if (!timer)
        abort(); /* as the stack does when it has no memory */
    *timer = (struct timer){net->timers, expired, timer_opaque, INT64_MAX};
    net->timers = timer;
    return timer;
}

static void timer_free(void *timer, void *opaque)
{
    struct slirp_net *net = opaque;

    for (struct timer **link = &net->timers; *link; link = &(*link)->next) {
        if (*link == timer) {
            *link = (*link)->next;
            free(timer);
            return;
        }
    }
}

static void timer_mod(void *timer, int64_t expires, void *opaque)
{
    (void)opaque;
    ((struct timer *)timer)->expires = expires;
}

static void run_timers(struct slirp_net *net)
{
    int64_t now = now_ms();

    for (struct timer *timer = net->timers, *next; timer; timer = next) {
        next = timer->next;
        if (timer->expires <= now) {
            timer->expires = INT64_MAX;
            timer->expired(timer->opaque);
        }
    }
}

static int timeout_ms(const struct slirp_net *net, uint32_t stack_wants)
{
    int64_t now = now_ms(), least = stack_wants == UINT32_MAX ? INT32_MAX : stack_wants;
    bool forever = stack_wants == UINT32_MAX;

    for (const struct timer *timer = net->timers; timer; timer = timer->next) {
        if (timer->expires != INT64_MAX) {
            forever = false;
            if (timer->expires - now < least)
                least = timer->expires - now;
        }
    }
    return forever ? -1 : least < 0 ? 0 : (int)least;
}

static void guest_error(const char *message, void *opaque)
{
    (void)message, (void)opaque; /* a guest does not get to fill the terminal */
}

static void ignore_fd(int fd, void *opaque)
{
    (void)fd, (void)opaque; /* the set is made anew before each poll */
}

static void ignore_notify(void *opaque)
{
    (void)opaque; /* comes from our own thread only, which polls next anyway */
}

static const SlirpCb callbacks = {
    .send_packet = send_packet,
    .guest_error = guest_error,
    .clock_get_ns = now_ns,
    .timer_new = timer_new,
    .timer_free = timer_free,
    .timer_mod = timer_mod,
    .register_poll_fd = ignore_fd,
    .unregister_poll_fd = ignore_fd,
    .notify = ignore_notify,
};

static const struct {
    int slirp;
    short poll;
} event_bits[] = {
    {SLIRP_POLL_IN, POLLIN},   {SLIRP_POLL_OUT, POLLOUT}, {SLIRP_POLL_PRI, POLLPRI},
    {SLIRP_POLL_ERR, POLLERR}, {SLIRP_POLL_HUP, POLLHUP},
};
#define EVENT_BITS (sizeof(event_bits) / sizeof(event_bits[0]))

static int add_poll(int fd, int events, void *opaque)
{
    struct slirp_net *net = opaque;
    short poll_events = 0;

    if (net->pollfd_count == net->pollfd_capacity) {
        int capacity = net->pollfd_capacity * 2;
        struct pollfd *larger = realloc(net->pollfds, (size_t)capacity * sizeof(*larger));
        if (!larger)
            return -1; /* the socket has to wait */
        net->pollfds = larger;
        net->pollfd_capacity = capacity;
    }
    for (size_t i = 0; i < EVENT_BITS; i++) {
        if (events & event_bits[i].slirp)
            poll_events |= event_bits[i].poll;
    }
    net->pollfds[net->pollfd_count] = (struct pollfd){.fd = fd, .events = poll_events};
    return net->pollfd_count++;
}

static int get_revents(int index, void *opaque)
{
    struct slirp_net *net = opaque;
    int events = 0;

    if (net->blocked) {
        if (net->cut < 0)
            net->cut = index;
        return 0; /* it will still be ready when there is room */
    }
    if (index < net->first)
        return 0;
    for (size_t i = 0; i < EVENT_BITS; i++) {
        if (net->pollfds[index].revents & event_bits[i].poll)
            events |= event_bits[i].slirp;
    }
    return events;
}

static void serve_sockets(struct slirp_net *net, bool poll_failed)
{
    net->cut = -1;
    slirp_pollfds_poll(net->slirp, poll_failed, get_revents, net);
    net->first = net->cut < 0 ? 0 : net->cut;
    run_timers(net);
    flush(net);
}

enum { STOP, GUEST, OURS };

int slirp_net_run(struct slirp_net *net)
{
    for (;;) {
        uint32_t stack_wants = UINT32_MAX;
        short guest_events = POLLIN;
        bool waiting = net->blocked;

        net->pollfd_count = OURS;
        if (waiting)
            guest_events = POLLOUT;
        else
            slirp_pollfds_fill(net->slirp, &stack_wants, add_poll, net);
        net->pollfds[STOP] = (struct pollfd){.fd = net->stop_fd, .events = POLLIN};
        net->pollfds[GUEST] = (struct pollfd){.fd = net->fd, .events = guest_events};

        int ready = poll(net->pollfds, (nfds_t)net->pollfd_count,
                         waiting ? -1 : timeout_ms(net, stack_wants));
        if (ready < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (net->pollfds[STOP].revents) {
            eventfd_take(net->stop_fd);
            return 0;
        }
        if (net->pollfds[GUEST].revents & POLLHUP)
            return 0;
        if (waiting) {
            flush(net);
            feed(net);
            flush(net);
            continue;
        }
        if (net->pollfds[GUEST].revents & POLLIN) {
            receive(net);
            feed(net);
            flush(net);
        }
        if (!net->blocked)
            serve_sockets(net, ready < 0);
    }
}

void slirp_net_stop(struct slirp_net *net)
{
    eventfd_signal(net->stop_fd);
}

void slirp_net_set_checked(struct slirp_net *net, bool checked)
{
    uint8_t flags = checked ? VIRTIO_NET_HDR_F_DATA_VALID : 0;
    __atomic_store_n(&net->out_header.flags, flags, __ATOMIC_RELAXED);
}

/* The socket of the port that was forwarded last, which libslirp does not tell: of those that the
 * stack polls, the one that `known` has not. */
static int newest_socket(struct slirp_net *net, const struct pollfd *known, int known_count)
{
    uint32_t timeout = UINT32_MAX;

    net->pollfd_count = 0;
    slirp_pollfds_fill(net->slirp, &timeout, add_poll, net);
    for (int i = 0; i < net->pollfd_count; i++) {
        int j = 0;
        while (j < known_count && known[j].fd != net->pollfds[i].fd)
            j++;
        if (j == known_count)
            return net->pollfds[i].fd;
    }
    return -1;
}

int slirp_net_forward(struct slirp_net *net, bool udp, uint32_t host, uint16_t host_port,
                      uint32_t guest, uint16_t guest_port)
{
    struct in_addr host_addr = {htonl(host)}, guest_addr = {htonl(guest)};
    struct sockaddr_in bound;
    socklen_t size = sizeof(bound);
    uint32_t timeout = UINT32_MAX;

    net->pollfd_count = 0;
    slirp_pollfds_fill(net->slirp, &timeout, add_poll, net);
    int known_count = net->pollfd_count;
    struct pollfd *known = malloc((size_t)(known_count + 1) * sizeof(*known));
    if (!known)
        return -ENOMEM;
    memcpy(known, net->pollfds, (size_t)known_count * sizeof(*known));

    int result = 0;
    errno = 0;
    if (slirp_add_hostfwd(net->slirp, udp, host_addr, host_port, guest_addr, guest_port) < 0) {
        result = errno ? -errno : -EINVAL;
    } else {
        int fd = newest_socket(net, known, known_count);
        if (fd < 0 || getsockname(fd, (struct sockaddr *)&bound, &size) < 0 ||
            (!udp && listen(fd, BACKLOG) < 0))
            result = errno ? -errno : -EIO;
        else
            result = ntohs(bound.sin_port);
    }
    free(known);
    return result;
}

struct slirp_net *slirp_net_create(const struct slirp_net_config *config, int fd)
{
    struct slirp_net *net = calloc(1, sizeof(*net));

    if (!net)
        return NULL;
    net->fd = fd;
    net->mtu = config->mtu;
    net->pollfd_capacity = 64;
    net->pollfds = malloc((size_t)net->pollfd_capacity * sizeof(*net->pollfds));
    net->in_frames = malloc(BATCH * sizeof(*net->in_frames));
    net->queue = malloc(QUEUE_BYTES);
    net->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!net->pollfds || !net->in_frames || !net->queue || net->stop_fd < 0)
        goto failed;
    for (int i = 0; i < BATCH; i++) {
        net->in_iov[i][0] = (struct iovec){&net->in_header, HEADER};
        net->in_iov[i][1] = (struct iovec){net->in_frames[i], FRAME_MAX};
        net->in[i].msg_hdr = (struct msghdr){.msg_iov = net->in_iov[i], .msg_iovlen = 2};
    }
    for (int i = 0; i < QUEUE_FRAMES; i++) {
        net->out_iov[i][0] = (struct iovec){&net->out_header, HEADER};
        net->out[i].msg_hdr = (struct msghdr){.msg_iov = net->out_iov[i], .msg_iovlen = 2};
    }

    SlirpConfig slirp_config = {
        .version = 1,
        .restricted = config->restricted,
        .in_enabled = true,
        .vnetwork = {htonl(config->network)},
        .vnetmask = {htonl(config->netmask)},
        .vhost = {htonl(config->host)},
        .in6_enabled = config->ipv6,
        .vprefix_len = 64,
        .vhostname = config->hostname,
        .vdhcp_start = {htonl(config->guest)},
        .vnameserver = {htonl(config->name_server)},
        .if_mtu = config->mtu,
        .if_mru = config->mtu,
        .disable_host_loopback = !config->host_loopback,
    };
    inet_pton(AF_INET6, "fec0::", &slirp_config.vprefix_addr6);
    inet_pton(AF_INET6, "fec0::2", &slirp_config.vhost6);
    inet_pton(AF_INET6, "fec0::3", &slirp_config.vnameserver6);
    errno = EINVAL; /* the only way in which slirp_new fails */
    net->slirp = slirp_new(&slirp_config, &callbacks, net);
    if (!net->slirp)
        goto failed;
    return net;

failed:;
    int error = errno;
    slirp_net_destroy(net);
    errno = error;
    return NULL;
}

void slirp_net_destroy(struct slirp_net *net)
{
    if (!net)
        return;
    if (net->slirp)
        slirp_cleanup(net->slirp);
    if (net->stop_fd >= 0)
        close(net->stop_fd);
    free(net->queue);
    free(net->in_frames);
    free(net->pollfds);
    free(net);
}

struct slirp_net_counters slirp_net_counters(const struct slirp_net *net)
{
    return net->counters;
}
