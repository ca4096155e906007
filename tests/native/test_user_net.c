/* The user network behind the network device: datagrams there and back, a driver without buffers, and
 * frames that make no sense. */
#include <poll.h>
#include <time.h>

#include "user_driver.h"

/* Takes datagram `number` and sends it back; where its sender is afterwards known. */
static void echo(struct user *user, uint32_t number, struct sockaddr_in *sender)
{
    uint8_t data[64];
    socklen_t size = sizeof(*sender);

    CHECK(recvfrom(user->socket, data, sizeof(data), 0, (struct sockaddr *)sender, &size) == 64);
    CHECK(((uint32_t)data[2] << 8 | data[3]) == number);
    CHECK(sendto(user->socket, data, sizeof(data), 0, (struct sockaddr *)sender, size) == 64);
}

static void check_answer(struct user *user, uint32_t number)
{
    uint32_t size;
    const uint8_t *frame = receive(user, &size);

    CHECK(size == 42 + 64 && frame[NET_HEADER + 23] == IPPROTO_UDP);
    CHECK(((uint32_t)frame[PAYLOAD_AT + 2] << 8 | frame[PAYLOAD_AT + 3]) == number);
}

static void test_there_and_back(void)
{
    struct user user;
    struct sockaddr_in sender;

    user_create(&user);
    net_driver_fill(&user.driver);
    introduce(&user);
    for (uint32_t number = 0; number < 1000; number++) {
        uint16_t id = number % NET_QUEUE_SIZE;

        send_frame(&user, id, put_datagram(tx_frame(&user, id), user.port, number, 64));
        echo(&user, number, &sender);
        check_answer(&user, number);
    }
    CHECK(slirp_net_counters(user.net).from_guest == 1001);
    user_destroy(&user);
}

/* What comes while the driver has no buffers waits for them, in order, and while it does, no frame
 * of the driver is taken, and no socket read. A device that is stopped meanwhile goes on with it. */
static void test_without_buffers(void)
{
    struct user user;
    struct sockaddr_in sender;
    struct net_ring *rx;
    uint8_t data[64] = {0};

    user_create(&user);
    rx = &user.driver.ring[0];
    net_ring_offer(rx, 0);
    net_ring_publish(rx);
    introduce(&user); /* one buffer */
    send_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 0, 64));
    echo(&user, 0, &sender); /* takes the buffer */
    for (uint32_t number = 1; number < 100; number++) {
        put32(data, number);
        CHECK(sendto(user.socket, data, 64, 0, (struct sockaddr *)&sender, sizeof(sender)) == 64);
    }
    offer_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 100, 64));
    while (slirp_net_counters(user.net).to_guest < 3) { /* with the ARP reply: it has no buffer */
        struct timespec moment = {0, 1000000};

        nanosleep(&moment, NULL);
    }
    net_ring_publish(&user.driver.ring[1]);
    struct pollfd readable = {user.socket, POLLIN, 0};
    CHECK(poll(&readable, 1, 50) == 0 && !net_ring_collect(&user.driver.ring[1]));
    CHECK(net_driver_stop(&user.driver) == VIRTIO_NET_STOPPED);
    net_driver_start(&user.driver);
    for (uint16_t id = 1; id < NET_QUEUE_SIZE; id++)
        net_ring_offer(rx, id);
    net_ring_publish(rx);
    for (uint32_t number = 0; number < 100; number++)
        check_answer(&user, number);
    CHECK(await(&user.driver.ring[1])->id == 0);
    echo(&user, 100, &sender);
    check_answer(&user, 100);
    CHECK(slirp_net_counters(user.net).dropped == 0);
    user_destroy(&user);
}

/* Headers of which some bytes are wrong, and lengths that do not agree with them. */
static void test_hostile_frames(void)
{
    struct user user;
    struct sockaddr_in sender;
    uint64_t state = 1;

    user_create(&user);
    for (unsigned i = 0; i < 20000; i++) {
        uint16_t id = i % NET_QUEUE_SIZE;
        uint8_t *frame = tx_frame(&user, id);
        uint32_t size = i % 3 ? put_datagram(frame, user.port, i, i % 100) : put_arp(frame);
        const struct vring_used_elem *element;

        for (unsigned wrong = 0; wrong < 4; wrong++) {
            uint32_t at;

            state = state * 6364136223846793005u + 1442695040888963407u;
            at = 12 + (uint32_t)(state >> 40) % (size - 12);
            if (at < 30 || at >= 34) /* nothing goes to another machine */
                frame[at] = (uint8_t)(state >> 33);
        }
        send_frame(&user, id, (state >> 60) ? size : 14 + (uint32_t)(state >> 33) % (size - 13));
        while ((element = net_ring_collect(&user.driver.ring[0])))
            net_ring_offer(&user.driver.ring[0], (uint16_t)element->id);
        if (i == 0)
            net_driver_fill(&user.driver);
        net_ring_publish(&user.driver.ring[0]);
        while (recv(user.socket, (uint8_t[200]){0}, 200, MSG_DONTWAIT) > 0)
            ;
    }
    send_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 7, 64));
    do {
        uint8_t data[200];
        socklen_t size = sizeof(sender);
        ssize_t got = recvfrom(user.socket, data, sizeof(data), 0, (struct sockaddr *)&sender, &size);

        if (got == 64 && data[3] == 7)
            break;
    } while (true);
    user_destroy(&user);
}

int main(void)
{
    test_there_and_back();
    test_without_buffers();
    test_hostile_frames();
    return 0;
}
