#include "scsi_disk.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* The most that a guest can make the monitor allocate for one command, beside a list of ranges. */
#define CHUNK_SIZE (256u << 10)
#define CHUNK_ALIGN 4096u

#define UNRECOVERED_READ_ERROR SCSI_SENSE(0x3, 0x11, 0x00)
#define WRITE_ERROR SCSI_SENSE(0x3, 0x0C, 0x00)
#define NOT_READY_START_UNIT SCSI_SENSE(0x2, 0x04, 0x02)
#define PARAMETER_LIST_LENGTH_ERROR SCSI_SENSE(0x5, 0x1A, 0x00)
#define LBA_OUT_OF_RANGE SCSI_SENSE(0x5, 0x21, 0x00)
#define WRITE_PROTECTED SCSI_SENSE(0x7, 0x27, 0x00)
#define SPACE_ALLOCATION_FAILED SCSI_SENSE(0x7, 0x27, 0x07)
#define INSUFFICIENT_RESOURCES SCSI_SENSE(0xB, 0x55, 0x03)
#define MISCOMPARE_DURING_VERIFY SCSI_SENSE(0xE, 0x1D, 0x00)

static struct scsi_disk *disk_of(const struct scsi_command *command)
{
    return (struct scsi_disk *)command->lun; /* its first member */
}

static struct scsi_command *command_of(struct blk_request *request)
{
    return (struct scsi_command *)((char *)request - offsetof(struct scsi_command, request));
}

static uint64_t capacity(const struct scsi_disk *disk)
{
    return __atomic_load_n(&disk->image->size, __ATOMIC_RELAXED) / disk->block_size;
}

static void refuse(struct scsi_command *command, uint32_t sense)
{
    scsi_sense(command, sense);
    scsi_done(command);
}

static void refuse_field(struct scsi_command *command, uint32_t byte, int bit)
{
    scsi_invalid_field(command, byte, bit);
    scsi_done(command);
}

static void answer(struct scsi_command *command, const void *data, uint32_t size,
                   uint32_t allocated)
{
    scsi_answer(command, data, size, allocated);
    scsi_done(command);
}

static void good(struct scsi_command *command)
{
    command->status = SCSI_GOOD;
    scsi_done(command);
}

static uint32_t sense_of_error(enum blk_op op, int error)
{
    if (error == -ENOSPC || error == -EDQUOT)
        return SPACE_ALLOCATION_FAILED;
    if (error == -ENOMEM)
        return INSUFFICIENT_RESOURCES;
    return op == BLK_READ ? UNRECOVERED_READ_ERROR : WRITE_ERROR;
}

/* --- where a CDB has its fields -------------------------------------------------------------- */

struct extent {
    uint64_t lba;
    uint32_t blocks;
    uint8_t lba_at; /* the byte where the field starts, for field pointers */
    uint8_t blocks_at;
};

static struct extent extent_of(const uint8_t *cdb)
{
    switch (cdb[0] >> 5) { /* the group code (SPC-4, 4.2.5.1) */
    case 0:
        /* A length of 0 stands for 256 (SBC-3, READ (6)). */
        return (struct extent){scsi_be32(cdb) & 0x1FFFFF, cdb[4] ? cdb[4] : 256, 1, 4};
    case 4:
        return (struct extent){scsi_be64(cdb + 2), scsi_be32(cdb + 10), 2, 10};
    case 5:
        return (struct extent){scsi_be32(cdb + 2), scsi_be32(cdb + 6), 2, 6};
    default:
        return (struct extent){scsi_be32(cdb + 2), scsi_be16(cdb + 7), 2, 7};
    }
}

/* Whether the unit is ready and the extent lies on it; otherwise the command is done. */
static bool check_extent(struct scsi_command *command, const struct extent *extent)
{
    const struct scsi_disk *disk = disk_of(command);
    uint64_t blocks = capacity(disk);

    if (__atomic_load_n(&disk->stopped, __ATOMIC_RELAXED)) {
        refuse(command, NOT_READY_START_UNIT);
        return false;
    }
    if (extent->lba > blocks || extent->blocks > blocks - extent->lba) {
        refuse(command, LBA_OUT_OF_RANGE);
        return false;
    }
    return true;
}

static bool check_writable(struct scsi_command *command)
{
    if (!disk_of(command)->readonly)
        return true;
    refuse(command, WRITE_PROTECTED);
    return false;
}

static bool check_transfer_length(struct scsi_command *command, const struct extent *extent)
{
    if (extent->blocks <= SCSI_DISK_MAX_TRANSFER / disk_of(command)->block_size)
        return true;
    refuse_field(command, extent->blocks_at, 7);
    return false;
}

/* Cuts `data` to what the command transfers. */
static bool check_data(struct scsi_command *command, struct scsi_data *data, uint32_t bytes)
{
    if (scsi_data_trim(data, bytes))
        return true;
    command->delivery = SCSI_OVERRUN;
    scsi_done(command);
    return false;
}

/* --- reads and writes ------------------------------------------------------------------------ */

#define FUA 0x08 /* in byte 1 of all but the 6-byte CDBs */

static bool stable(const struct scsi_command *command)
{
    return !__atomic_load_n(&disk_of(command)->write_cache, __ATOMIC_RELAXED);
}

static void transfer_done(struct blk_request *request, int error)
{
    struct scsi_command *command = command_of(request);

    if (error) {
        scsi_sense(command, sense_of_error(request->op, error));
    } else {
        command->status = SCSI_GOOD;
        if (request->op != BLK_FLUSH)
            command->transferred = command->in.bytes + command->out.bytes;
    }
    scsi_done(command);
}

static void submit_read(struct scsi_command *command)
{
    command->request = (struct blk_request){
        .image = disk_of(command)->image,
        .op = BLK_READ,
        .offset = extent_of(command->cdb).lba * disk_of(command)->block_size,
        .iov = command->in.iov,
        .iov_count = command->in.count,
        .done = transfer_done,
    };
    blk_io_submit(command->io, &command->request);
}

static void flushed_before_read(struct blk_request *request, int error)
{
    struct scsi_command *command = command_of(request);

    if (error)
        refuse(command, sense_of_error(BLK_FLUSH, error));
    else
        submit_read(command);
}

/* Checks all of a READ or WRITE, and cuts `data` to what it transfers. */
static bool prepare_transfer(struct scsi_command *command, const struct extent *extent,
                             struct scsi_data *data)
{
    if (!check_transfer_length(command, extent) || !check_extent(command, extent))
        return false;
    return check_data(command, data, extent->blocks * disk_of(command)->block_size);
}

static void read_blocks(struct scsi_lun *lun, struct scsi_command *command)
{
    const uint8_t *cdb = command->cdb;
    struct extent extent = extent_of(cdb);

    (void)lun;
    if (!prepare_transfer(command, &extent, &command->in))
        return;
    if (cdb[0] >> 5 == 0 || !(cdb[1] & FUA)) {
        submit_read(command);
        return;
    }
    /* What is newer in the cache goes to the medium first (SBC-3, 4.15: caches). */
    command->request = (struct blk_request){
        .image = disk_of(command)->image, .op = BLK_FLUSH, .done = flushed_before_read};
    blk_io_submit(command->io, &command->request);
}

static void write_blocks(struct scsi_lun *lun, struct scsi_command *command)
{
    const uint8_t *cdb = command->cdb;
    struct extent extent = extent_of(cdb);
    struct scsi_disk *disk = disk_of(command);

    (void)lun;
    if (!check_writable(command) || !prepare_transfer(command, &extent, &command->out))
        return;
    command->request = (struct blk_request){
        .image = disk->image,
        .op = BLK_WRITE,
        .stable = (cdb[0] >> 5 != 0 && (cdb[1] & FUA)) || stable(command),
        .offset = extent.lba * disk->block_size,
        .iov = command->out.iov,
        .iov_count = command->out.count,
        .done = transfer_done,
    };
    blk_io_submit(command->io, &command->request);
}

static void synchronize_cache(struct scsi_lun *lun, struct scsi_command *command)
{
    struct extent extent = extent_of(command->cdb); /* 0 blocks: up to the end */

    (void)lun;
    if (!check_extent(command, &extent))
        return;
    /* All of it, which is more than was asked for; with IMMED, too, the status comes after. */
    command->request = (struct blk_request){
        .image = disk_of(command)->image, .op = BLK_FLUSH, .done = transfer_done};
    blk_io_submit(command->io, &command->request);
}

/* --- a piece after the other: VERIFY, WRITE SAME with a pattern ------------------------------ */

struct pieces {
    struct blk_range whole; /* the first member: a WRITE SAME of zeroes needs nothing else */
    uint64_t offset;
    uint64_t left;
    uint32_t size;     /* of the piece that is under way */
    struct iovec iov;
    uint32_t checked;  /* bytes of data-out that were compared */
    uint8_t *expected; /* one block that every block must be equal to; NULL: see `checked` */
    bool compare;
    bool submitting;   /* completions within blk_io_submit do not nest */
    bool completed;
    int error;
    uint8_t *chunk;
};

static void end_pieces(struct scsi_command *command, uint32_t sense)
{
    struct pieces *pieces = command->private_data;

    command->private_data = NULL;
    free(pieces->chunk);
    free(pieces);
    if (sense)
        scsi_sense(command, sense);
    else
        command->transferred = command->out.bytes;
    scsi_done(command);
}

/* Whether the chunk is what data-out holds, from `checked` on. */
static bool equals_data_out(struct scsi_command *command)
{
    struct pieces *pieces = command->private_data;
    const struct iovec *iov = command->out.iov;
    uint64_t skip = pieces->checked;
    const uint8_t *chunk = pieces->chunk;
    uint64_t left = pieces->size;

    pieces->checked += pieces->size;
    for (; skip >= iov->iov_len; iov++)
        skip -= iov->iov_len;
    for (; left > 0; iov++) {
        uint64_t length = iov->iov_len - skip < left ? iov->iov_len - skip : left;

        if (memcmp(chunk, (const uint8_t *)iov->iov_base + skip, length) != 0)
            return false;
        chunk += length;
        left -= length;
        skip = 0;
    }
    return true;
}

static bool equals_block(struct scsi_command *command)
{
    const struct pieces *pieces = command->private_data;
    uint32_t size = disk_of(command)->block_size;

    for (uint32_t at = 0; at < pieces->size; at += size)
        if (memcmp(pieces->chunk + at, pieces->expected, size) != 0)
            return false;
    return true;
}

/* Takes note of a piece. False when the command is done. */
static bool piece_ended(struct scsi_command *command, int error)
{
    struct pieces *pieces = command->private_data;

    if (error) {
        end_pieces(command, sense_of_error(command->request.op, error));
        return false;
    }
    if (pieces->compare &&
        !(pieces->expected ? equals_block(command) : equals_data_out(command))) {
        end_pieces(command, MISCOMPARE_DURING_VERIFY);
        return false;
    }
    pieces->offset += pieces->size;
    pieces->left -= pieces->size;
    if (pieces->left == 0 || command->cancelled) {
        end_pieces(command, 0);
        return false;
    }
    return true;
}

static void run_pieces(struct scsi_command *command, enum blk_op op);

static void piece_done(struct blk_request *request, int error)
{
    struct scsi_command *command = command_of(request);
    struct pieces *pieces = command->private_data;

    if (pieces->submitting) {
        pieces->completed = true;
        pieces->error = error;
    } else if (piece_ended(command, error)) {
        run_pieces(command, request->op);
    }
}

static void run_pieces(struct scsi_command *command, enum blk_op op)
{
    struct pieces *pieces = command->private_data;

    do {
        pieces->size = pieces->left < CHUNK_SIZE ? (uint32_t)pieces->left : CHUNK_SIZE;
        pieces->iov = (struct iovec){pieces->chunk, pieces->size};
        pieces->submitting = true;
        pieces->completed = false;
        command->request = (struct blk_request){
            .image = disk_of(command)->image,
            .op = op,
            .stable = op == BLK_WRITE && stable(command),
            .offset = pieces->offset,
            .iov = &pieces->iov,
            .iov_count = 1,
            .done = piece_done,
        };
        blk_io_submit(command->io, &command->request);
        pieces->submitting = false;
    } while (pieces->completed && piece_ended(command, pieces->error));
}

/* NULL: the command is done, for want of memory. */
static struct pieces *create_pieces(struct scsi_command *command, const struct extent *extent)
{
    uint32_t block_size = disk_of(command)->block_size;
    struct pieces *pieces = calloc(1, sizeof(*pieces));

    if (pieces) {
        pieces->offset = extent->lba * block_size;
        pieces->left = (uint64_t)extent->blocks * block_size;
        pieces->chunk = aligned_alloc(CHUNK_ALIGN, CHUNK_SIZE + CHUNK_ALIGN);
        pieces->expected = pieces->chunk + CHUNK_SIZE;
        command->private_data = pieces;
        if (pieces->chunk)
            return pieces;
    }
    free(pieces);
    command->private_data = NULL;
    refuse(command, INSUFFICIENT_RESOURCES);
    return NULL;
}

static void verify(struct scsi_lun *lun, struct scsi_command *command)
{
    enum { MEDIUM = 0, ALL_BYTES = 1, ONE_BLOCK = 3 }; /* BYTCHK */

    struct extent extent = extent_of(command->cdb);
    unsigned check = command->cdb[1] >> 1 & 3;
    uint32_t block_size = disk_of(command)->block_size;
    uint32_t expected = check == MEDIUM ? 0 : check == ONE_BLOCK ? 1 : extent.blocks;
    struct pieces *pieces;

    (void)lun;
    if (check == 2) {
        refuse_field(command, 1, 2);
        return;
    }
    if (!check_transfer_length(command, &extent) || !check_extent(command, &extent))
        return;
    if (extent.blocks == 0) {
        good(command);
        return;
    }
    if (!check_data(command, &command->out, expected * block_size))
        return;
    pieces = create_pieces(command, &extent);
    if (!pieces)
        return;
    pieces->compare = check != MEDIUM;
    if (check == ONE_BLOCK)
        scsi_parameters(command, pieces->expected, block_size);
    else
        pieces->expected = NULL;
    run_pieces(command, BLK_READ);
}

/* --- giving space back, writing zeroes ------------------------------------------------------- */

/* What a request works on: freed when it is done. */
static void ranges_done(struct blk_request *request, int error)
{
    struct scsi_command *command = command_of(request);

    free(command->private_data);
    command->private_data = NULL;
    /* To unmap is a wish (SBC-3, 4.7: provisioning); zeroes are always written, one way or the other. */
    if (request->op == BLK_DISCARD && error == -EOPNOTSUPP)
        error = 0;
    if (error)
        scsi_sense(command, sense_of_error(request->op, error));
    scsi_done(command);
}

static void submit_ranges(struct scsi_command *command, enum blk_op op, bool may_unmap,
                          uint32_t count)
{
    command->request = (struct blk_request){
        .image = disk_of(command)->image,
        .op = op,
        .stable = stable(command),
        .may_unmap = may_unmap,
        .ranges = command->private_data,
        .range_count = count,
        .done = ranges_done,
    };
    blk_io_submit(command->io, &command->request);
}

static bool all_zero(const uint8_t *block, uint32_t size)
{
    return block[0] == 0 && memcmp(block, block + 1, size - 1) == 0;
}

static void write_same(struct scsi_lun *lun, struct scsi_command *command)
{
    enum { NDOB = 0x01, UNMAP = 0x08 };

    const uint8_t *cdb = command->cdb;
    struct scsi_disk *disk = disk_of(command);
    struct extent extent = extent_of(cdb);
    bool unmap = cdb[1] & UNMAP;
    bool has_block = cdb[0] == 0x41 || !(cdb[1] & NDOB);
    struct pieces *pieces;

    if (unmap && !(lun->abilities & SCSI_DISK_UNMAP)) {
        refuse_field(command, 1, 3);
        return;
    }
    /* WSNZ is set: 0 does not stand for the rest of the disk (SBC-3, Block Limits page). */
    if (extent.blocks == 0 || extent.blocks > SCSI_DISK_MAX_RANGE / disk->block_size) {
        refuse_field(command, extent.blocks_at, 7);
        return;
    }
    if (!check_writable(command) || !check_extent(command, &extent))
        return;
    if (!check_data(command, &command->out, has_block ? disk->block_size : 0))
        return;
    pieces = create_pieces(command, &extent);
    if (!pieces)
        return;
    if (has_block)
        scsi_parameters(command, pieces->chunk, disk->block_size);
    else
        memset(pieces->chunk, 0, disk->block_size);
    if (all_zero(pieces->chunk, disk->block_size)) {
        free(pieces->chunk);
        pieces->whole = (struct blk_range){pieces->offset, pieces->left};
        submit_ranges(command, BLK_WRITE_ZEROES, unmap, 1);
        return;
    }
    for (uint32_t at = disk->block_size; at < CHUNK_SIZE; at += disk->block_size)
        memcpy(pieces->chunk + at, pieces->chunk, disk->block_size);
    run_pieces(command, BLK_WRITE);
}

/* The default format (SBC-3, FORMAT UNIT): nothing but zeroes, which take no space where that is possible. */
static void format_unit(struct scsi_lun *lun, struct scsi_command *command)
{
    struct scsi_disk *disk = disk_of(command);
    struct extent nothing = {.lba = 0};
    struct blk_range *whole;

    if (!check_writable(command) || !check_extent(command, &nothing))
        return;
    whole = malloc(sizeof(*whole));
    if (!whole) {
        refuse(command, INSUFFICIENT_RESOURCES);
        return;
    }
    *whole = (struct blk_range){0, capacity(disk) * disk->block_size};
    command->private_data = whole;
    submit_ranges(command, BLK_WRITE_ZEROES, lun->abilities & SCSI_DISK_UNMAP, 1);
}

/* The block descriptors of an UNMAP as ranges; NULL: the command is done. */
static struct blk_range *read_descriptors(struct scsi_command *command, const uint8_t *list,
                                          uint32_t count)
{
    const struct scsi_disk *disk = disk_of(command);
    struct blk_range *ranges = malloc((count + 1) * sizeof(*ranges));
    uint64_t total = 0;

    if (!ranges) {
        refuse(command, INSUFFICIENT_RESOURCES);
        return NULL;
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *descriptor = list + 8 + 16 * i;
        struct extent extent = {.lba = scsi_be64(descriptor), .blocks = scsi_be32(descriptor + 8)};

        total += extent.blocks;
        if (total > SCSI_DISK_MAX_RANGE / disk->block_size) {
            free(ranges);
            scsi_invalid_parameter(command, 8 + 16 * i + 8, 7);
            scsi_done(command);
            return NULL;
        }
        if (!check_extent(command, &extent)) {
            free(ranges);
            return NULL;
        }
        ranges[i] = (struct blk_range){extent.lba * disk->block_size,
                                       (uint64_t)extent.blocks * disk->block_size};
    }
    return ranges;
}

static void unmap(struct scsi_lun *lun, struct scsi_command *command)
{
    uint8_t list[8 + 16 * SCSI_DISK_MAX_UNMAP_DESCRIPTORS];
    uint32_t size = scsi_be16(command->cdb + 7);
    uint32_t descriptors;

    (void)lun;
    if (!check_writable(command))
        return;
    if (size == 0) {
        good(command);
        return;
    }
    if (size > sizeof(list)) {
        refuse_field(command, 7, 7);
        return;
    }
    if (!scsi_parameters(command, list, size)) {
        scsi_done(command);
        return;
    }
    descriptors = size < 8 ? 0 : scsi_be16(list + 2);
    if (size < 8 || descriptors > size - 8) {
        refuse(command, PARAMETER_LIST_LENGTH_ERROR);
        return;
    }
    command->private_data = read_descriptors(command, list, descriptors / 16);
    if (command->private_data)
        submit_ranges(command, BLK_DISCARD, true, descriptors / 16);
}

/* --- small answers ---------------------------------------------------------------------------- */

static void test_unit_ready(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    if (__atomic_load_n(&disk_of(command)->stopped, __ATOMIC_RELAXED))
        refuse(command, NOT_READY_START_UNIT);
    else
        good(command);
}

static void request_sense(struct scsi_lun *lun, struct scsi_command *command)
{
    uint8_t sense[SCSI_SENSE_MAX];
    uint32_t code = scsi_attention_take(lun);

    if (!code && __atomic_load_n(&disk_of(command)->stopped, __ATOMIC_RELAXED))
        code = NOT_READY_START_UNIT;
    answer(command, sense, scsi_format_sense(sense, code, command->cdb[1] & 1), command->cdb[4]);
}

static void read_capacity_10(struct scsi_lun *lun, struct scsi_command *command)
{
    const struct scsi_disk *disk = disk_of(command);
    uint64_t last = capacity(disk) - 1;
    uint8_t data[8];

    (void)lun;
    scsi_put_be32(data, last < UINT32_MAX ? (uint32_t)last : UINT32_MAX);
    scsi_put_be32(data + 4, disk->block_size);
    answer(command, data, sizeof(data), sizeof(data));
}

static void read_capacity_16(struct scsi_lun *lun, struct scsi_command *command)
{
    const struct scsi_disk *disk = disk_of(command);
    uint8_t data[32] = {0};

    scsi_put_be64(data, capacity(disk) - 1);
    scsi_put_be32(data + 8, disk->block_size);
    data[13] = disk->physical_exponent;
    if (lun->abilities & SCSI_DISK_UNMAP)
        data[14] = 0x80 | (disk->zeroed ? 0x40 : 0); /* LBPME, LBPRZ */
    answer(command, data, sizeof(data), scsi_be32(command->cdb + 10));
}

static void start_stop_unit(struct scsi_lun *lun, struct scsi_command *command)
{
    enum { START = 0x01, NO_FLUSH = 0x04 };

    struct scsi_disk *disk = disk_of(command);
    uint8_t what = command->cdb[4];

    (void)lun;
    __atomic_store_n(&disk->stopped, !(what & START), __ATOMIC_RELAXED);
    if ((what & START) || (what & NO_FLUSH)) {
        good(command);
        return;
    }
    command->request = (struct blk_request){
        .image = disk->image, .op = BLK_FLUSH, .done = transfer_done};
    blk_io_submit(command->io, &command->request);
}

/* PREVENT ALLOW MEDIUM REMOVAL, of which the medium is incapable anyway, and SEND DIAGNOSTIC, of
 * which there is only the default self-test, which finds nothing. */
static void succeed(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    good(command);
}

/* Reservations of SPC-2, with nobody else to keep out; where persistent reservations are in use
 * they are without effect (CRH, SPC-4 5.13). */
static void reserve(struct scsi_lun *lun, struct scsi_command *command)
{
    struct scsi_disk *disk = disk_of(command);

    (void)lun;
    if (!__atomic_load_n(&disk->registered, __ATOMIC_RELAXED))
        __atomic_store_n(&disk->reserved, true, __ATOMIC_RELAXED);
    good(command);
}

static void release(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    __atomic_store_n(&disk_of(command)->reserved, false, __ATOMIC_RELAXED);
    good(command);
}

static void to_python(struct scsi_lun *lun, struct scsi_command *command)
{
    scsi_handoff_give(((struct scsi_disk *)lun)->handoff, command);
}

/* --- the table -------------------------------------------------------------------------------- */

#define LBA_4 0xFF, 0xFF, 0xFF, 0xFF
#define LBA_8 LBA_4, LBA_4
#define LENGTH_2 0xFF, 0xFF
#define LENGTH_4 0xFF, 0xFF, 0xFF, 0xFF
#define NONE SCSI_NO_SERVICE_ACTION
#define PYTHON to_python

/* Not evaluated, and so refused: protection information, group numbers, anchors, NACA. The front
 * end answers REPORT LUNS by itself. */
static const struct scsi_opcode opcodes[] = {
    {0x00, 6, NONE, {0x00}, test_unit_ready, 0},
    {0x03, 6, NONE, {0x03, 0x01, 0, 0, 0xFF}, request_sense, 0},
    {0x04, 6, NONE, {0x04}, format_unit, 0},
    {0x08, 6, NONE, {0x08, 0x1F, 0xFF, 0xFF, 0xFF}, read_blocks, 0},
    {0x0A, 6, NONE, {0x0A, 0x1F, 0xFF, 0xFF, 0xFF}, write_blocks, 0},
    {0x12, 6, NONE, {0x12, 0x01, 0xFF, LENGTH_2}, scsi_inquiry, 0},
    {0x15, 6, NONE, {0x15, 0x11, 0, 0, 0xFF}, PYTHON, 0},
    {0x16, 6, NONE, {0x16}, reserve, 0},
    {0x17, 6, NONE, {0x17}, release, 0},
    {0x1A, 6, NONE, {0x1A, 0x08, 0xFF, 0xFF, 0xFF}, PYTHON, 0},
    {0x1B, 6, NONE, {0x1B, 0x01, 0, 0, 0x05}, start_stop_unit, 0},
    {0x1D, 6, NONE, {0x1D, 0x04}, succeed, 0},
    {0x1E, 6, NONE, {0x1E, 0, 0, 0, 0x03}, succeed, 0},
    {0x25, 10, NONE, {0x25}, read_capacity_10, 0},
    {0x28, 10, NONE, {0x28, 0x18, LBA_4, 0, LENGTH_2}, read_blocks, 0},
    {0x2A, 10, NONE, {0x2A, 0x18, LBA_4, 0, LENGTH_2}, write_blocks, 0},
    {0x2F, 10, NONE, {0x2F, 0x16, LBA_4, 0, LENGTH_2}, verify, 0},
    {0x35, 10, NONE, {0x35, 0x02, LBA_4, 0, LENGTH_2}, synchronize_cache, 0},
    {0x41, 10, NONE, {0x41, 0x08, LBA_4, 0, LENGTH_2}, write_same, 0},
    {0x42, 10, NONE, {0x42, 0, 0, 0, 0, 0, 0, LENGTH_2}, unmap, SCSI_DISK_UNMAP},
    {0x55, 10, NONE, {0x55, 0x11, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x56, 10, NONE, {0x56}, reserve, 0},
    {0x57, 10, NONE, {0x57}, release, 0},
    {0x5A, 10, NONE, {0x5A, 0x18, 0xFF, 0xFF, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5E, 10, 0x00, {0x5E, 0x1F, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5E, 10, 0x01, {0x5E, 0x1F, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5E, 10, 0x02, {0x5E, 0x1F, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5E, 10, 0x03, {0x5E, 0x1F, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5F, 10, 0x00, {0x5F, 0x1F, 0, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x01, {0x5F, 0x1F, 0xFF, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x02, {0x5F, 0x1F, 0xFF, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x03, {0x5F, 0x1F, 0, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x04, {0x5F, 0x1F, 0xFF, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x05, {0x5F, 0x1F, 0xFF, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x5F, 10, 0x06, {0x5F, 0x1F, 0, 0, 0, LENGTH_4}, PYTHON, 0},
    {0x88, 16, NONE, {0x88, 0x18, LBA_8, LENGTH_4}, read_blocks, 0},
    {0x8A, 16, NONE, {0x8A, 0x18, LBA_8, LENGTH_4}, write_blocks, 0},
    {0x8F, 16, NONE, {0x8F, 0x16, LBA_8, LENGTH_4}, verify, 0},
    {0x91, 16, NONE, {0x91, 0x02, LBA_8, LENGTH_4}, synchronize_cache, 0},
    {0x93, 16, NONE, {0x93, 0x09, LBA_8, LENGTH_4}, write_same, 0},
    {0x9E, 16, 0x10, {0x9E, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0, LENGTH_4}, read_capacity_16, 0},
    {0xA0, 12, NONE, {0xA0, 0, 0xFF, 0, 0, 0, LENGTH_4}, NULL, 0},
    {0xA3, 12, 0x0C, {0xA3, 0x1F, 0x87, 0xFF, LENGTH_2, LENGTH_4}, PYTHON, 0},
    {0xA3, 12, 0x0D, {0xA3, 0x1F, 0x80, 0, 0, 0, LENGTH_4}, PYTHON, 0},
    {0xA8, 12, NONE, {0xA8, 0x18, LBA_4, LENGTH_4}, read_blocks, 0},
    {0xAA, 12, NONE, {0xAA, 0x18, LBA_4, LENGTH_4}, write_blocks, 0},
    {0xAF, 12, NONE, {0xAF, 0x16, LBA_4, LENGTH_4}, verify, 0},
};

static const struct scsi_opcodes all_opcodes = {opcodes, sizeof(opcodes) / sizeof(opcodes[0])};

const struct scsi_opcodes *scsi_disk_opcodes(void)
{
    return &all_opcodes;
}

/* --- the logical unit ------------------------------------------------------------------------- */

static void execute(struct scsi_lun *lun, struct scsi_command *command)
{
    scsi_execute_from(&all_opcodes, lun, command);
}

static void reset(struct scsi_lun *lun)
{
    struct scsi_disk *disk = (struct scsi_disk *)lun;

    __atomic_store_n(&disk->write_cache, disk->default_write_cache, __ATOMIC_RELAXED);
    __atomic_store_n(&lun->descriptor_sense, false, __ATOMIC_RELAXED);
    __atomic_store_n(&disk->stopped, false, __ATOMIC_RELAXED);
    __atomic_store_n(&disk->reserved, false, __ATOMIC_RELAXED);
}

static const struct scsi_lun_ops ops = {.execute = execute, .reset = reset};

int scsi_disk_init(struct scsi_disk *disk, const struct scsi_page *pages, uint32_t page_count)
{
    int result = scsi_lun_init(&disk->lun, &ops, pages, page_count);

    reset(&disk->lun);
    return result;
}

void scsi_disk_destroy(struct scsi_disk *disk)
{
    scsi_lun_destroy(&disk->lun);
}
