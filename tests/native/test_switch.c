/* The switch with the sockets of its ports in this program's hands: who gets what, who loses what,
 * and messages that make no sense. */
#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "net_gso.h"
#include "net_switch.h"

#define HEADER 12u
#define PORTS 3
#define QUIET_MS 50

struct lab {
    struct net_switch *hub;
    int listen_fd;
    int ports[PORTS];
    pthread_t thread;
    int result;
};

static void *serve(void *argument)
{
    struct lab *lab = argument;

    lab->result = net_switch_run(lab->hub, true);
    return NULL;
}

static void lab_create(struct lab *lab)
{
    lab->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
    CHECK(listen(lab->listen_fd, 1) == 0 || errno == EINVAL); /* nobody needs its name */
    lab->hub = net_switch_create(lab->listen_fd);
    CHECK(lab->hub);
    for (int i = 0; i < PORTS; i++) {
        int fds[2];

        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) == 0);
        CHECK(net_switch_add(lab->hub, fds[1]) == 0);
        lab->ports[i] = fds[0];
    }
    CHECK(pthread_create(&lab->thread, NULL, serve, lab) == 0);
}

/* When the last port has left, the switch ends. */
static void lab_destroy(struct lab *lab)
{
    for (int i = 0; i < PORTS; i++) {
        if (lab->ports[i] >= 0)
            close(lab->ports[i]);
    }
    CHECK(pthread_join(lab->thread, NULL) == 0 && lab->result == NET_SWITCH_EMPTY);
    net_switch_destroy(lab->hub);
    close(lab->listen_fd);
}

/* A frame of `size` bytes from station `from` to station `to`, 0xFF meaning all. */
static uint32_t put_frame(uint8_t *message, uint8_t to, uint8_t from, uint32_t size)
{
    memset(message, 0, HEADER + size);
    memset(message + HEADER, to == 0xFF ? 0xFF : 0x02, 6);
    memset(message + HEADER + 6, 0x02, 6);
    message[HEADER + 5] = to;
    message[HEADER + 11] = from;
    message[HEADER + 12] = 0x88;
    message[HEADER + 13] = 0xB5;
    return HEADER + size;
}

static void send_frame(struct lab *lab, int port, uint8_t to, uint8_t from, uint32_t size)
{
    static uint8_t message[NET_MESSAGE_MAX];
    uint32_t length = put_frame(message, to, from, size);

    CHECK(send(lab->ports[port], message, length, 0) == (ssize_t)length);
}

/* The size of the next frame at a port, whose sender must be `from`. */
static uint32_t receive(struct lab *lab, int port, uint8_t from)
{
    static uint8_t message[NET_MESSAGE_MAX];
    struct pollfd readable = {lab->ports[port], POLLIN, 0};
    ssize_t size;

    CHECK(poll(&readable, 1, 10000) == 1);
    size = recv(lab->ports[port], message, sizeof(message), 0);
    CHECK(size >= (ssize_t)HEADER + 14 && message[HEADER + 11] == from);
    return (uint32_t)size - HEADER;
}

static bool is_quiet(struct lab *lab, int port)
{
    struct pollfd readable = {lab->ports[port], POLLIN, 0};

    return poll(&readable, 1, QUIET_MS) == 0;
}

static void test_stations(void)
{
    struct lab lab;

    lab_create(&lab);
    send_frame(&lab, 0, 2, 1, 60); /* nobody knows where 2 is */
    CHECK(receive(&lab, 1, 1) == 60 && receive(&lab, 2, 1) == 60);
    send_frame(&lab, 1, 1, 2, 61); /* but 1 is known now */
    CHECK(receive(&lab, 0, 2) == 61 && is_quiet(&lab, 2));
    send_frame(&lab, 0, 2, 1, 62); /* and 2 */
    CHECK(receive(&lab, 1, 1) == 62 && is_quiet(&lab, 2));
    send_frame(&lab, 2, 1, 2, 63); /* 2 has moved */
    CHECK(receive(&lab, 0, 2) == 63);
    send_frame(&lab, 0, 2, 1, 64);
    CHECK(receive(&lab, 2, 1) == 64 && is_quiet(&lab, 1));
    close(lab.ports[2]); /* and has gone */
    lab.ports[2] = -1;
    while (net_switch_counters(lab.hub).ports == PORTS)
        poll(NULL, 0, 1);
    send_frame(&lab, 0, 2, 1, 65);
    CHECK(receive(&lab, 1, 1) == 65);
    lab_destroy(&lab);
}

/* It loses its own frames, beyond what is kept for it, and keeps their order. */
static void test_a_port_that_does_not_read(void)
{
    enum { FRAMES = 400, SIZE = 60000 };
    struct lab lab;
    uint32_t got = 0;

    lab_create(&lab);
    for (unsigned i = 0; i < FRAMES; i++) {
        send_frame(&lab, 0, 0xFF, 1, SIZE + i);
        CHECK(receive(&lab, 1, 1) == SIZE + i);
    }
    for (unsigned i = 0; i < FRAMES - net_switch_counters(lab.hub).dropped; i++) {
        CHECK(receive(&lab, 2, 1) == SIZE + i);
        got++;
    }
    CHECK(got > 50 && got < FRAMES && is_quiet(&lab, 2));
    send_frame(&lab, 0, 0xFF, 1, 60);
    CHECK(receive(&lab, 2, 1) == 60);
    lab_destroy(&lab);
}

/* Any message, from two ports, before a third that takes no offloads and one that takes all. */
static void test_hostile_messages(void)
{
    static uint8_t message[NET_MESSAGE_MAX + 100];
    const uint32_t all = NET_SWITCH_OFFLOADS;
    struct lab lab;
    uint64_t state = 1;

    lab_create(&lab);
    CHECK(send(lab.ports[1], &all, sizeof(all), 0) == sizeof(all));
    for (unsigned i = 0; i < 20000; i++) {
        int from = (int)(i % 2);
        uint32_t size;

        state = state * 6364136223846793005u + 1442695040888963407u;
        size = (uint32_t)(state >> 33);
        size = state >> 58 ? 1 + size % 200 : 1 + size % (uint32_t)sizeof(message);
        put_frame(message, i % 5 ? 0xFF : 2, (uint8_t)from, size < 60 ? 60 : size % 60000);
        for (unsigned wrong = 0; wrong < 12; wrong++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            message[(state >> 40) % (HEADER + 60)] = (uint8_t)(state >> 33);
        }
        if (i % 3) { /* IP, so that what the header says is tried on it */
            message[HEADER + 12] = 0x08;
            message[HEADER + 13] = 0x00;
            message[HEADER + 14] = 0x45;
        }
        message[HEADER + 6] &= 0xFE;
        CHECK(send(lab.ports[from], message, size, 0) == (ssize_t)size);
        for (int port = 0; port < PORTS; port++) {
            while (recv(lab.ports[port], message, sizeof(message), MSG_DONTWAIT) > 0)
                ;
        }
    }
    while (!is_quiet(&lab, 0) || !is_quiet(&lab, 2)) {
        for (int port = 0; port < PORTS; port++) {
            while (recv(lab.ports[port], message, sizeof(message), MSG_DONTWAIT) > 0)
                ;
        }
    }
    send_frame(&lab, 0, 0xFF, 9, 60);
    CHECK(receive(&lab, 2, 9) == 60);
    CHECK(net_switch_counters(lab.hub).malformed > 0);
    lab_destroy(&lab);
}

int main(void)
{
    test_stations();
    test_a_port_that_does_not_read();
    test_hostile_messages();
    return 0;
}
