#include "virtq.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#define VIRTQ_MAX_SIZE 32768u

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the rings are little-endian");
_Static_assert(sizeof(struct vring_desc) == 16, "descriptor of virtio 1.2, section 2.7.5");
_Static_assert(sizeof(struct vring_used_elem) == 8, "used element of virtio 1.2, section 2.7.8");

/* The driver may write any field at any time, so every access to a ring is one of these. */
#define ring_load(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define ring_store(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)

/* avail->ring[size] and the two bytes after used->ring[size] (virtio 1.2, 2.7.6 and 2.7.8). */
static uint16_t *used_event(const struct virtq *vq)
{
    return &((struct vring_avail *)vq->avail)->ring[vq->size];
}

static uint16_t *avail_event(const struct virtq *vq)
{
    return (uint16_t *)&((struct vring_used *)vq->used)->ring[vq->size];
}

int virtq_init(struct virtq *vq, const struct guest_mem *mem, const struct virtq_config *config)
{
    uint64_t size = config->size;

    if (size == 0 || size > VIRTQ_MAX_SIZE || (size & (size - 1)) != 0)
        return -EINVAL;
    if (config->desc_gpa % 16 != 0 || config->avail_gpa % 2 != 0 || config->used_gpa % 4 != 0)
        return -EINVAL;

    *vq = (struct virtq){
        .mem = mem,
        .desc = guest_mem_at(mem, config->desc_gpa, 16 * size),
        .avail = guest_mem_at(mem, config->avail_gpa, 6 + 2 * size),
        .used = guest_mem_at(mem, config->used_gpa, 6 + 8 * size),
        .size = config->size,
        .event_idx = config->event_idx,
        .indirect = config->indirect,
    };
    return vq->desc && vq->avail && vq->used ? 0 : -EINVAL;
}

/* One descriptor, copied once: what is checked is what is used, whatever the driver writes
 * meanwhile. Indirect tables need no alignment, hence the bytes. */
static inline struct vring_desc read_desc(const uint8_t *table, uint32_t index)
{
    struct vring_desc desc;

    memcpy(&desc, table + sizeof(desc) * index, sizeof(desc));
    __asm__ volatile("" : : : "memory"); /* the compiler must not read guest memory again */
    return desc;
}

/* The table that an indirect descriptor names, or NULL (virtio 1.2, 2.7.5.3.1). */
static const uint8_t *indirect_table(const struct virtq *vq, const struct vring_desc *desc)
{
    if ((desc->flags & VRING_DESC_F_NEXT) || desc->len == 0 || desc->len % sizeof(*desc) != 0)
        return NULL;
    return guest_mem_at(vq->mem, desc->addr, desc->len);
}

/* Follows the chain from `head` (virtio 1.2, 2.7.5 and 2.7.7). False when it is malformed. */
static bool walk_chain(const struct virtq *vq, uint16_t head, struct virtq_chain *chain)
{
    const uint8_t *table = vq->desc;
    uint32_t table_size = vq->size;
    uint32_t index = head;
    uint32_t left = vq->size; /* buffers that the chain may still have: this ends loops */
    bool indirect = vq->indirect;
    struct iovec *iov = chain->iov;
    struct iovec *writable = NULL; /* the first device-writable entry */
    uint64_t bytes = 0;
    uint64_t readable_bytes = 0;

    for (;;) {
        struct vring_desc desc = read_desc(table, index);

        if (desc.flags & VRING_DESC_F_INDIRECT) {
            /* At most one table, and the last in its chain. The descriptor that names it does
             * not count as part of the chain: Linux fills tables of `size`. */
            if (!indirect)
                return false;
            indirect = false;
            table = indirect_table(vq, &desc);
            if (!table)
                return false;
            table_size = desc.len / sizeof(desc);
            index = 0;
            continue;
        }

        if (left-- == 0)
            return false;
        if (!(desc.flags & VRING_DESC_F_WRITE)) {
            if (writable)
                return false; /* device-readable ones come first (2.7.4.2) */
        } else if (!writable) {
            writable = iov;
            readable_bytes = bytes;
        }
        if (desc.len != 0) { /* an empty buffer has no place in guest memory: it is left out */
            void *hva = guest_mem_at(vq->mem, desc.addr, desc.len);

            if (!hva)
                return false;
            *iov++ = (struct iovec){ .iov_base = hva, .iov_len = desc.len };
            bytes += desc.len;
        }
        if (!(desc.flags & VRING_DESC_F_NEXT))
            break;
        index = desc.next;
        if (index >= table_size)
            return false;
    }
    if (bytes > UINT32_MAX)
        return false;
    if (!writable) {
        writable = iov;
        readable_bytes = bytes;
    }

    chain->head = head;
    chain->readable = (uint16_t)(writable - chain->iov);
    chain->writable = (uint16_t)(iov - writable);
    chain->readable_bytes = (uint32_t)readable_bytes;
    chain->writable_bytes = (uint32_t)(bytes - readable_bytes);
    return true;
}

/* Reads the driver's available index. A driver has at most `size` chains that we have not yet
 * returned, since each takes a descriptor (2.7.13); an index beyond that, or one that went
 * back, cannot be followed. This also bounds what one guest can make virtq_pop skip. */
static enum virtq_result read_avail_idx(struct virtq *vq)
{
    const struct vring_avail *avail = vq->avail;
    /* Acquire: pairs with the driver's write barrier between filling the available ring and
     * storing avail->idx (2.7.13.3.1), so the entries and descriptors read next are the new ones. */
    uint16_t idx = __atomic_load_n(&avail->idx, __ATOMIC_ACQUIRE);
    uint16_t unreturned = vq->next_avail - vq->published_used;

    if (idx == vq->next_avail)
        return VIRTQ_EMPTY;
    if ((uint16_t)(idx - vq->next_avail) > vq->size - unreturned) {
        vq->broken = true;
        return VIRTQ_BROKEN;
    }
    vq->avail_idx = idx;
    return VIRTQ_CHAIN;
}

enum virtq_result virtq_pop(struct virtq *vq, struct virtq_chain *chain)
{
    const struct vring_avail *avail = vq->avail;

    if (vq->broken)
        return VIRTQ_BROKEN;
    for (;;) {
        uint16_t next = vq->next_avail;
        uint16_t head;

        if (next == vq->avail_idx) {
            enum virtq_result result = read_avail_idx(vq);

            if (result != VIRTQ_CHAIN)
                return result;
        }
        head = ring_load(avail->ring[next & (vq->size - 1)]);
        vq->next_avail = next + 1;
        if (head < vq->size) {
            if (walk_chain(vq, head, chain)) {
                vq->chains++;
                return VIRTQ_CHAIN;
            }
            virtq_push(vq, head, 0);
        }
        vq->malformed++;
    }
}

void virtq_push(struct virtq *vq, uint16_t head, uint32_t written)
{
    struct vring_used *used = vq->used;
    struct vring_used_elem *element = &used->ring[vq->next_used & (vq->size - 1)];

    assert(vq->next_used != vq->next_avail); /* every chain is returned once */
    ring_store(element->id, head);
    ring_store(element->len, written);
    vq->next_used++;
}

bool virtq_publish(struct virtq *vq)
{
    struct vring_used *used = vq->used;
    const struct vring_avail *avail = vq->avail;
    uint16_t old = vq->published_used;

    if (vq->next_used == old)
        return false;
    /* Release: pairs with the driver's read barrier between loading used->idx and reading the
     * used elements and buffers (2.7.14). */
    __atomic_store_n(&used->idx, vq->next_used, __ATOMIC_RELEASE);
    vq->published_used = vq->next_used;

    /* Full: pairs with the driver's barrier between asking for interrupts (storing used_event,
     * or clearing its flag) and loading used->idx again (2.7.7.1): one of us sees the other. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (vq->event_idx)
        return vring_need_event(ring_load(*used_event(vq)), vq->next_used, old);
    return !(ring_load(avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

void virtq_disable_notify(struct virtq *vq)
{
    struct vring_used *used = vq->used;

    /* With EVENT_IDX nothing is to do: avail_event stays where it is, and the driver, which has
     * gone past it, notifies no more (2.7.10). */
    if (!vq->event_idx)
        ring_store(used->flags, VRING_USED_F_NO_NOTIFY);
}

bool virtq_enable_notify(struct virtq *vq)
{
    struct vring_used *used = vq->used;
    const struct vring_avail *avail = vq->avail;

    if (vq->broken)
        return false;
    if (vq->event_idx)
        ring_store(*avail_event(vq), vq->next_avail);
    else
        ring_store(used->flags, 0);
    /* Full: pairs with the driver's barrier between storing avail->idx and loading avail_event or
     * our flag (2.7.13.4.1): either it sees our request and notifies, or we see its chain. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return ring_load(avail->idx) != vq->next_avail;
}

enum virtq_result virtq_side_pop(struct virtq_side *side, struct virtq_chain *chain, bool needed)
{
    for (;;) {
        enum virtq_result result = virtq_pop(&side->vq, chain);

        if (result == VIRTQ_CHAIN && side->armed) {
            side->armed = false;
            virtq_disable_notify(&side->vq);
        }
        if (result != VIRTQ_EMPTY || !needed ||
            (side->armed && side->armed_at == side->vq.next_avail))
            return result;
        side->armed = true;
        side->armed_at = side->vq.next_avail;
        if (!virtq_enable_notify(&side->vq))
            return side->vq.broken ? VIRTQ_BROKEN : VIRTQ_EMPTY;
    }
}
