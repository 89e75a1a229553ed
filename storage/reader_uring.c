/* reader on io_uring, and the only file that knows liburing.
 *
 * One ring per reader, owned by one thread. Each read in the ring holds a slot; the completion's
 * user_data is the slot's number and its generation, which changes at every use, so that a
 * completion that nobody waits for (or waits for no longer) is counted and ignored instead of being
 * credited to the slot's next read. Reads in flight never exceed the depth, the depth never exceeds
 * the submission queue, and the completion queue is twice that: neither can overflow.
 *
 * submit enters the kernel once per batch, wait once when nothing is there yet. With DEFER_TASKRUN
 * completions are posted only when this thread enters the kernel, all of them at once; TASKRUN_FLAG
 * tells a wait that does not block whether entering would bring any.
 *
 * When io_uring_enter itself fails for good (EPERM or ENOSYS from a seccomp filter that came later,
 * or anything else that is not a request to try again), the reader becomes a pread one and all that
 * was in flight is read again. What the kernel already had may still write to its buffer, and
 * without io_uring_enter the end of that cannot be waited for, so the change-over first gives these
 * reads LOSS_WAIT_MS; a ring without DEFER_TASKRUN shows them complete in that time. */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <time.h>

#include "storage/reader_internal.h"

#define LOSS_WAIT_MS 1000u
/* Rounds of a millisecond for "try again" from io_uring_enter while nothing is in the ring. */
#define REFUSALS_MAX 16u

struct slot {
    struct reader_read *read; /* NULL: free */
    uint32_t generation;
};

struct reader_uring {
    struct io_uring ring;
    uint32_t in_kernel; /* accepted by io_uring_enter, completion not seen */
    bool lost;
    uint64_t stray_count;
    uint32_t free_count;
    uint16_t free_slots[READER_DEPTH_MAX];
    struct slot slots[READER_DEPTH_MAX];
};

static int ring_init(struct io_uring *ring, uint32_t depth)
{
    /* No SQPOLL (it burns a core), no IOPOLL (few block devices take it). */
    static const unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                  IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL;
    int rc = io_uring_queue_init(depth, ring, flags);

    if (rc == -EINVAL) /* kernels before 6.1 */
        rc = io_uring_queue_init(depth, ring, 0);
    return rc;
}

static void sleep_millisecond(void)
{
    struct timespec pause = {.tv_sec = 0, .tv_nsec = 1000000};

    nanosleep(&pause, NULL);
}

/* Gives the read a slot and, while there is a ring, a place in the submission queue. */
static void place(struct reader_uring *uring, struct reader_read *read)
{
    uint32_t number = uring->free_slots[--uring->free_count];
    struct slot *slot = &uring->slots[number];
    struct io_uring_sqe *sqe;

    slot->read = read;
    slot->generation++;
    if (uring->lost)
        return;
    sqe = io_uring_get_sqe(&uring->ring);
    if (!sqe) {
        /* More reads than entries: the depth forbids it. The change-over reads it all the same. */
        uring->lost = true;
        return;
    }
    io_uring_prep_read(sqe, read->file->fd, read->buffer + read->done_bytes,
                       read->bytes - read->done_bytes, read->offset + read->done_bytes);
    io_uring_sqe_set_data64(sqe, (uint64_t)slot->generation << 32 | number);
}

static struct reader_read *vacate(struct reader_uring *uring, uint32_t number)
{
    struct reader_read *read = uring->slots[number].read;

    uring->slots[number].read = NULL;
    uring->free_slots[uring->free_count++] = (uint16_t)number;
    return read;
}

static void complete(struct reader *reader, uint64_t user_data, int result)
{
    struct reader_uring *uring = reader->uring;
    uint32_t number = (uint32_t)user_data;
    struct reader_read *read;
    struct vfs *vfs;

    if (number >= reader->depth || !uring->slots[number].read ||
        uring->slots[number].generation != (uint32_t)(user_data >> 32)) {
        uring->stray_count++;
        return;
    }
    uring->in_kernel--;
    read = vacate(uring, number);
    vfs = read->file->vfs;
    if (vfs->read_result)
        result = vfs->read_result(read->file, read->buffer + read->done_bytes,
                                  read->bytes - read->done_bytes, read->offset + read->done_bytes,
                                  result);
    if (reader_settle(read, result))
        reader_list_push(&reader->ready, read);
    else
        place(uring, read);
}

/* All completions the queue shows, without entering the kernel. */
static void harvest(struct reader *reader)
{
    struct io_uring *ring = &reader->uring->ring;
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;

    io_uring_for_each_cqe(ring, head, cqe)
    {
        complete(reader, cqe->user_data, cqe->res);
        seen++;
    }
    io_uring_cq_advance(ring, seen);
}

/* Hands the submission queue to the kernel. 0 also when the kernel wants it tried again later, with
 * the rest still queued; a negative errno when the ring is of no use any more. */
static int push(struct reader_uring *uring)
{
    while (!uring->lost && io_uring_sq_ready(&uring->ring) > 0) {
        int rc = io_uring_submit(&uring->ring);

        if (rc > 0)
            uring->in_kernel += (uint32_t)rc;
        else if (rc == 0 || rc == -EAGAIN || rc == -EBUSY)
            return 0;
        else if (rc != -EINTR)
            return rc;
    }
    return uring->lost ? -EIO : 0;
}

/* Lets the kernel post completions, waiting for one if `block`. Negative errno: no use any more. */
static int enter(struct reader_uring *uring, bool block, uint32_t *refusals)
{
    struct io_uring_cqe *cqe;
    int rc;

    if (block && uring->in_kernel == 0) {
        /* Everything was refused by push, so no completion would ever come. */
        if (++*refusals > REFUSALS_MAX)
            return -EAGAIN;
        sleep_millisecond();
        return 0;
    }
    rc = block ? io_uring_wait_cqe(&uring->ring, &cqe) : io_uring_get_events(&uring->ring);
    if (rc == -EINTR || rc == -EAGAIN || rc == -EBUSY)
        return 0;
    return rc < 0 ? rc : 0;
}

static bool has_unposted(const struct reader_uring *uring)
{
    return IO_URING_READ_ONCE(*uring->ring.sq.kflags) & (IORING_SQ_CQ_OVERFLOW | IORING_SQ_TASKRUN);
}

/* The ring is of no use any more: the reader goes on as a pread one. */
static void change_over(struct reader *reader)
{
    struct reader_uring *uring = reader->uring;

    uring->lost = true;
    for (uint32_t ms = 0; ms < LOSS_WAIT_MS && uring->in_kernel > 0; ms++) {
        harvest(reader);
        if (uring->in_kernel > 0)
            sleep_millisecond();
    }
    io_uring_queue_exit(&uring->ring);
    reader->uring = NULL;
    reader_pread_attach(reader);
    for (uint32_t number = 0; number < reader->depth; number++) {
        struct reader_read *read = uring->slots[number].read;

        if (read)
            reader->ops->submit(reader, &read, 1);
    }
    free(uring);
}

static void uring_submit(struct reader *reader, struct reader_read **reads, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (reads[i]->file->fd >= 0)
            place(reader->uring, reads[i]);
    }
    if (push(reader->uring) < 0)
        change_over(reader);
    /* A file without a descriptor has nothing for the kernel. These wait for nobody, so they come
     * after what the disk can do meanwhile. */
    for (uint32_t i = 0; i < count; i++) {
        if (reads[i]->file->fd < 0) {
            reader_read_now(reads[i]);
            reader_list_push(&reader->ready, reads[i]);
        }
    }
}

static void uring_reap(struct reader *reader, bool block)
{
    struct reader_uring *uring = reader->uring;
    uint32_t refusals = 0;

    for (;;) {
        harvest(reader);
        /* Reads to be resumed, and what the kernel refused before. */
        if (push(uring) < 0)
            break;
        if (reader->ready.count > 0)
            return;
        if (!block && !has_unposted(uring))
            return;
        if (enter(uring, block, &refusals) < 0)
            break;
        if (!block && io_uring_cq_ready(&uring->ring) == 0)
            return;
    }
    change_over(reader);
    if (reader->ready.count < reader->in_flight)
        reader->ops->reap(reader, block && reader->ready.count == 0);
}

static void uring_close(struct reader *reader)
{
    io_uring_queue_exit(&reader->uring->ring);
    free(reader->uring);
    reader->uring = NULL;
}

static const struct reader_ops uring_ops = {
    .submit = uring_submit,
    .reap = uring_reap,
    .close = uring_close,
};

int reader_uring_attach(struct reader *reader)
{
    struct reader_uring *uring = calloc(1, sizeof *uring);
    int rc;

    if (!uring)
        return -ENOMEM;
    rc = ring_init(&uring->ring, reader->depth);
    if (rc < 0) {
        free(uring);
        return rc;
    }
    for (uint32_t i = 0; i < reader->depth; i++)
        uring->free_slots[uring->free_count++] = (uint16_t)(reader->depth - 1 - i);
    reader->uring = uring;
    reader->ops = &uring_ops;
    reader->backend = READER_URING;
    return 0;
}

uint64_t reader_uring_strays(const struct reader *reader)
{
    return reader->uring ? reader->uring->stray_count : 0;
}

/* One request through the ring, start to end. */
static int try_one(struct io_uring *ring, int *result)
{
    struct io_uring_cqe *cqe;
    int rc;

    do
        rc = io_uring_submit_and_wait(ring, 1);
    while (rc == -EINTR);
    if (rc < 0)
        return rc;
    do
        rc = io_uring_wait_cqe(ring, &cqe);
    while (rc == -EINTR);
    if (rc < 0)
        return rc;
    *result = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return 0;
}

int reader_uring_try(int fd, void *block, uint32_t bytes, enum reader_trial *trial)
{
    struct io_uring ring;
    int result = 0;
    int rc;

    *trial = READER_TRIAL_SETUP;
    rc = ring_init(&ring, 4);
    if (rc < 0)
        return rc;
    *trial = READER_TRIAL_NOP;
    io_uring_prep_nop(io_uring_get_sqe(&ring));
    rc = try_one(&ring, &result);
    if (rc == 0)
        rc = result;
    if (rc < 0)
        goto done;
    *trial = READER_TRIAL_READ;
    io_uring_prep_read(io_uring_get_sqe(&ring), fd, block, bytes, 0);
    rc = try_one(&ring, &result);
    if (rc == 0)
        rc = result;
    if (rc >= 0)
        *trial = READER_TRIAL_VERIFY;
done:
    io_uring_queue_exit(&ring);
    return rc;
}
