#include "scsi_cdrom.h"

#include <stddef.h>

#define UNRECOVERED_READ_ERROR SCSI_SENSE(0x3, 0x11, 0x00)
#define LBA_OUT_OF_RANGE SCSI_SENSE(0x5, 0x21, 0x00)
#define ILLEGAL_MODE_FOR_THIS_TRACK SCSI_SENSE(0x5, 0x64, 0x00)
#define MEDIUM_NOT_PRESENT_TRAY_CLOSED SCSI_SENSE(0x2, 0x3A, 0x01)
#define MEDIUM_NOT_PRESENT_TRAY_OPEN SCSI_SENSE(0x2, 0x3A, 0x02)

static struct scsi_cdrom *cdrom_of(const struct scsi_command *command)
{
    return (struct scsi_cdrom *)command->lun; /* its first member */
}

static void refuse(struct scsi_command *command, uint32_t sense)
{
    scsi_sense(command, sense);
    scsi_done(command);
}

static void good(struct scsi_command *command)
{
    command->status = SCSI_GOOD;
    scsi_done(command);
}

/* The sense code of a drive that is not ready; 0: it is, and has that many blocks. */
static uint32_t why_not_ready(struct scsi_cdrom *cdrom, uint64_t *blocks)
{
    uint32_t sense = 0;

    pthread_mutex_lock(&cdrom->lock);
    if (cdrom->image)
        *blocks = cdrom->image->size / SCSI_CDROM_BLOCK;
    else
        sense = cdrom->tray_open ? MEDIUM_NOT_PRESENT_TRAY_OPEN : MEDIUM_NOT_PRESENT_TRAY_CLOSED;
    pthread_mutex_unlock(&cdrom->lock);
    return sense;
}

/* --- reads ------------------------------------------------------------------------------------ */

/* The medium to read; NULL: the command is done. */
static struct blk_image *take_medium(struct scsi_command *command)
{
    struct scsi_cdrom *cdrom = cdrom_of(command);
    struct blk_image *image;
    uint32_t sense = 0;

    pthread_mutex_lock(&cdrom->lock);
    image = cdrom->image;
    if (image)
        cdrom->reads++;
    else
        sense = cdrom->tray_open ? MEDIUM_NOT_PRESENT_TRAY_OPEN : MEDIUM_NOT_PRESENT_TRAY_CLOSED;
    pthread_mutex_unlock(&cdrom->lock);
    if (!image)
        refuse(command, sense);
    return image;
}

static void release_medium(struct scsi_cdrom *cdrom)
{
    pthread_mutex_lock(&cdrom->lock);
    if (--cdrom->reads == 0)
        pthread_cond_broadcast(&cdrom->idle);
    pthread_mutex_unlock(&cdrom->lock);
}

static void read_done(struct blk_request *request, int error)
{
    struct scsi_command *command =
        (struct scsi_command *)((char *)request - offsetof(struct scsi_command, request));

    release_medium(cdrom_of(command));
    if (error) {
        scsi_sense(command, UNRECOVERED_READ_ERROR);
    } else {
        command->status = SCSI_GOOD;
        command->transferred = command->in.bytes;
    }
    scsi_done(command);
}

/* `blocks_at` is where the CDB has the number of blocks. */
static void start_read(struct scsi_command *command, uint32_t lba, uint32_t blocks,
                       uint32_t blocks_at)
{
    struct blk_image *image = take_medium(command);
    uint64_t capacity;

    if (!image)
        return;
    capacity = image->size / SCSI_CDROM_BLOCK;
    if (blocks > SCSI_CDROM_MAX_TRANSFER / SCSI_CDROM_BLOCK) {
        scsi_invalid_field(command, blocks_at, 7);
    } else if (lba > capacity || blocks > capacity - lba) {
        scsi_sense(command, LBA_OUT_OF_RANGE);
    } else if (!scsi_data_trim(&command->in, blocks * SCSI_CDROM_BLOCK)) {
        command->delivery = SCSI_OVERRUN;
    } else {
        command->request = (struct blk_request){
            .image = image,
            .op = BLK_READ,
            .offset = (uint64_t)lba * SCSI_CDROM_BLOCK,
            .iov = command->in.iov,
            .iov_count = command->in.count,
            .done = read_done,
        };
        blk_io_submit(command->io, &command->request);
        return;
    }
    release_medium(cdrom_of(command));
    scsi_done(command);
}

static void read_10(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    start_read(command, scsi_be32(command->cdb + 2), scsi_be16(command->cdb + 7), 7);
}

static void read_12(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    start_read(command, scsi_be32(command->cdb + 2), scsi_be32(command->cdb + 6), 6);
}

/* READ CD (MMC-6, 6.19), of user data alone: an image has nothing else. */
static void read_cd(struct scsi_lun *lun, struct scsi_command *command)
{
    enum { ANY = 0, MODE_1 = 2, USER_DATA = 0x10 };

    const uint8_t *cdb = command->cdb;
    uint32_t sector_type = cdb[1] >> 2 & 7;
    uint32_t blocks = scsi_be32(cdb + 5) & 0xFFFFFF;

    (void)lun;
    if (sector_type != ANY && sector_type != MODE_1) {
        refuse(command, ILLEGAL_MODE_FOR_THIS_TRACK);
        return;
    }
    if (cdb[9] != USER_DATA) {
        if (cdb[9] == 0)
            blocks = 0; /* nothing is selected */
        else {
            scsi_invalid_field(command, 9, 7);
            scsi_done(command);
            return;
        }
    }
    start_read(command, scsi_be32(cdb + 2), blocks, 6);
}

/* --- small answers ---------------------------------------------------------------------------- */

static void test_unit_ready(struct scsi_lun *lun, struct scsi_command *command)
{
    uint64_t blocks;
    uint32_t sense = why_not_ready((struct scsi_cdrom *)lun, &blocks);

    if (sense)
        refuse(command, sense);
    else
        good(command);
}

static void request_sense(struct scsi_lun *lun, struct scsi_command *command)
{
    uint8_t sense[SCSI_SENSE_MAX];
    uint64_t blocks;
    uint32_t code = scsi_attention_take(lun);

    if (!code)
        code = why_not_ready((struct scsi_cdrom *)lun, &blocks);
    scsi_answer(command, sense, scsi_format_sense(sense, code, command->cdb[1] & 1),
                command->cdb[4]);
    scsi_done(command);
}

static void read_capacity(struct scsi_lun *lun, struct scsi_command *command)
{
    uint64_t blocks;
    uint32_t sense = why_not_ready((struct scsi_cdrom *)lun, &blocks);
    uint8_t data[8];

    if (sense) {
        refuse(command, sense);
        return;
    }
    scsi_put_be32(data, (uint32_t)(blocks - 1));
    scsi_put_be32(data + 4, SCSI_CDROM_BLOCK);
    scsi_answer(command, data, sizeof(data), sizeof(data));
    scsi_done(command);
}

static void seek(struct scsi_lun *lun, struct scsi_command *command)
{
    uint64_t blocks;
    uint32_t sense = why_not_ready((struct scsi_cdrom *)lun, &blocks);

    if (!sense && scsi_be32(command->cdb + 2) >= blocks)
        sense = LBA_OUT_OF_RANGE;
    if (sense)
        refuse(command, sense);
    else
        good(command);
}

/* The speed is what it is. */
static void set_cd_speed(struct scsi_lun *lun, struct scsi_command *command)
{
    (void)lun;
    good(command);
}

static void to_python(struct scsi_lun *lun, struct scsi_command *command)
{
    scsi_handoff_give(((struct scsi_cdrom *)lun)->handoff, command);
}

/* --- the table -------------------------------------------------------------------------------- */

#define LBA_4 0xFF, 0xFF, 0xFF, 0xFF
#define LENGTH_2 0xFF, 0xFF
#define LENGTH_3 0xFF, 0xFF, 0xFF
#define LENGTH_4 0xFF, 0xFF, 0xFF, 0xFF
#define NONE SCSI_NO_SERVICE_ACTION
#define PYTHON to_python

/* The front end answers REPORT LUNS by itself. */
static const struct scsi_opcode opcodes[] = {
    {0x00, 6, NONE, {0x00}, test_unit_ready, 0},
    {0x03, 6, NONE, {0x03, 0x01, 0, 0, 0xFF}, request_sense, 0},
    {0x12, 6, NONE, {0x12, 0x01, 0xFF, LENGTH_2}, scsi_inquiry, 0},
    {0x15, 6, NONE, {0x15, 0x11, 0, 0, 0xFF}, PYTHON, 0},
    {0x1A, 6, NONE, {0x1A, 0x08, 0xFF, 0xFF, 0xFF}, PYTHON, 0},
    {0x1B, 6, NONE, {0x1B, 0x01, 0, 0, 0xF3}, PYTHON, 0},
    {0x1E, 6, NONE, {0x1E, 0, 0, 0, 0x03}, PYTHON, 0},
    {0x25, 10, NONE, {0x25}, read_capacity, 0},
    {0x28, 10, NONE, {0x28, 0x18, LBA_4, 0, LENGTH_2}, read_10, 0},
    {0x2B, 10, NONE, {0x2B, 0, LBA_4}, seek, 0},
    /* The format may stand in the last byte, where SFF-8020 had it. */
    {0x43, 10, NONE, {0x43, 0x02, 0x0F, 0, 0, 0, 0xFF, LENGTH_2, 0xC0}, PYTHON, 0},
    {0x46, 10, NONE, {0x46, 0x03, 0xFF, 0xFF, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x4A, 10, NONE, {0x4A, 0x01, 0, 0, 0xFF, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x51, 10, NONE, {0x51, 0x07, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x52, 10, NONE, {0x52, 0x07, LBA_4, 0, LENGTH_2}, PYTHON, 0},
    {0x55, 10, NONE, {0x55, 0x11, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0x5A, 10, NONE, {0x5A, 0x18, 0xFF, 0xFF, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0xA0, 12, NONE, {0xA0, 0, 0xFF, 0, 0, 0, LENGTH_4}, NULL, 0},
    {0xA3, 12, 0x0C, {0xA3, 0x1F, 0x87, 0xFF, LENGTH_2, LENGTH_4}, PYTHON, 0},
    {0xA3, 12, 0x0D, {0xA3, 0x1F, 0x80, 0, 0, 0, LENGTH_4}, PYTHON, 0},
    {0xA8, 12, NONE, {0xA8, 0x18, LBA_4, LENGTH_4}, read_12, 0},
    {0xAD, 12, NONE, {0xAD, 0x0F, LBA_4, 0xFF, 0xFF, LENGTH_2, 0xC0}, PYTHON, 0},
    {0xBB, 12, NONE, {0xBB, 0x03, LENGTH_2, LENGTH_2}, set_cd_speed, 0},
    {0xBD, 12, NONE, {0xBD, 0, 0, 0, 0, 0, 0, 0, LENGTH_2}, PYTHON, 0},
    {0xBE, 12, NONE, {0xBE, 0x1E, LBA_4, LENGTH_3, 0xFE}, read_cd, 0},
};

static const struct scsi_opcodes all_opcodes = {opcodes, sizeof(opcodes) / sizeof(opcodes[0])};

const struct scsi_opcodes *scsi_cdrom_opcodes(void)
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
    __atomic_store_n(&((struct scsi_cdrom *)lun)->prevent, 0, __ATOMIC_RELAXED);
}

static const struct scsi_lun_ops ops = {.execute = execute, .reset = reset};

int scsi_cdrom_init(struct scsi_cdrom *cdrom, const struct scsi_page *pages, uint32_t page_count)
{
    int result = scsi_lun_init(&cdrom->lun, &ops, pages, page_count);

    if (result == 0) {
        pthread_mutex_init(&cdrom->lock, NULL);
        pthread_cond_init(&cdrom->idle, NULL);
    }
    return result;
}

void scsi_cdrom_destroy(struct scsi_cdrom *cdrom)
{
    pthread_cond_destroy(&cdrom->idle);
    pthread_mutex_destroy(&cdrom->lock);
    scsi_lun_destroy(&cdrom->lun);
}

void scsi_cdrom_set_medium(struct scsi_cdrom *cdrom, struct blk_image *image, bool tray_open)
{
    pthread_mutex_lock(&cdrom->lock);
    cdrom->image = image;
    cdrom->tray_open = tray_open;
    while (cdrom->reads > 0)
        pthread_cond_wait(&cdrom->idle, &cdrom->lock);
    pthread_mutex_unlock(&cdrom->lock);
}
