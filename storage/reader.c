/* The half of reader that is the same for both backends.
 *
 * A read is complete when reader_settle() says so; both backends feed it their results, so that a
 * short read, an interrupted one and the end of the file mean the same on either. Backends put
 * complete reads on `ready`, reader_wait() takes them off. A reader may change from io_uring to
 * pread in mid-flight (reader_uring.c), which is why calls go through reader->ops each time.
 *
 * The probe runs io_uring in a child process: a seccomp filter may answer io_uring_setup by killing
 * the caller, and nothing but another process survives finding that out. The child tells its parent
 * through a pipe how far it came; a child that says nothing was killed. */
#include "storage/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/file.h"
#include "storage/reader_internal.h"

#define PROBE_TIMEOUT_MS 10000
#define PROBE_FILE "/proc/self/exe"

void reader_list_push(struct reader_list *list, struct reader_read *read)
{
    read->next = NULL;
    if (list->last)
        list->last->next = read;
    else
        list->first = read;
    list->last = read;
    list->count++;
}

struct reader_read *reader_list_pop(struct reader_list *list)
{
    struct reader_read *read = list->first;

    if (!read)
        return NULL;
    list->first = read->next;
    if (!list->first)
        list->last = NULL;
    list->count--;
    read->next = NULL;
    return read;
}

bool reader_settle(struct reader_read *read, int64_t result)
{
    uint32_t missing = read->bytes - read->done_bytes;
    uint32_t progress;

    if (result == -EAGAIN || result == -EINTR) {
        if (read->retries++ < READER_RETRIES_MAX)
            return false;
        read->error = (int)-result;
        return true;
    }
    if (result < 0) {
        read->error = result >= -4095 ? (int)-result : EIO;
        return true;
    }
    if (result == missing) {
        read->done_bytes = read->bytes;
        read->error = 0;
        return true;
    }
    /* Nothing: the file ends here. More than asked: no file does that. */
    if (result == 0 || result > missing) {
        read->error = EIO;
        return true;
    }
    /* Short. O_DIRECT takes aligned offsets only, so a block that came in part is read again. At
     * the end of a file whose length is no multiple of a block that never ends well: hence the
     * bound on rounds without progress. */
    progress = (uint32_t)result & ~(FILE_BLOCK_BYTES - 1);
    read->done_bytes += progress;
    if (progress == 0 && read->retries++ >= READER_RETRIES_MAX) {
        read->error = EIO;
        return true;
    }
    return false;
}

void reader_read_now(struct reader_read *read)
{
    struct vfs_file *file = read->file;
    int64_t result;

    do {
        size_t got = 0;
        int rc =
            file->vfs->pread(file, read->buffer + read->done_bytes, read->bytes - read->done_bytes,
                             read->offset + read->done_bytes, &got);

        result = rc < 0 ? rc : (int64_t)got;
    } while (!reader_settle(read, result));
}

int reader_open(enum reader_backend backend, uint32_t depth, struct reader **out, struct error *err)
{
    struct reader *reader = NULL;
    enum reader_backend wanted = backend;
    char reason[256];
    int rc = -1;

    if (depth < 1 || depth > READER_DEPTH_MAX) {
        error_set(err, ERR_INVALID, "reader depth is %u, wanted 1 to %u", depth, READER_DEPTH_MAX);
        goto done;
    }
    if (backend == READER_AUTO)
        wanted = reader_probe(reason);
    reader = calloc(1, sizeof *reader);
    if (!reader) {
        error_set(err, ERR_NOMEM, "no memory for a reader of depth %u", depth);
        goto done;
    }
    reader->depth = depth;
    if (wanted == READER_URING) {
        int uring_rc = reader_uring_attach(reader);

        /* The probe had one ring; the n-th may still meet a limit on descriptors or on locked
         * memory. Who asked for io_uring by name is told, everyone else gets the fallback. */
        if (uring_rc < 0 && backend == READER_URING) {
            if (uring_rc == -ENOMEM)
                error_set(err, ERR_NOMEM, "no memory for an io_uring of depth %u", depth);
            else
                error_set(err, ERR_UNSUPPORTED, "io_uring_setup with depth %u: %s", depth,
                          strerrordesc_np(-uring_rc));
            error_remedy(err, "choose the pread backend, which needs nothing from the kernel");
            goto done;
        }
    }
    if (!reader->ops)
        reader_pread_attach(reader);
    *out = reader;
    reader = NULL;
    rc = 0;
done:
    free(reader);
    return rc;
}

void reader_close(struct reader *reader)
{
    struct reader_read *scratch[64];

    if (!reader)
        return;
    /* The kernel or a thread may be writing to the buffers until the last one is back. */
    while (reader_wait(reader, scratch, 64, true) > 0)
        ;
    reader->ops->close(reader);
    free(reader);
}

int reader_submit(struct reader *reader, struct reader_read **reads, uint32_t count,
                  struct error *err)
{
    if (count > reader->depth - reader->in_flight)
        return error_set(err, ERR_INVALID, "%u reads on top of %u in flight, the depth is %u",
                         count, reader->in_flight, reader->depth);
    for (uint32_t i = 0; i < count; i++) {
        const struct reader_read *read = reads[i];

        if (read->bytes == 0 ||
            (read->offset | read->bytes | (uintptr_t)read->buffer) % FILE_BLOCK_BYTES != 0)
            return error_set(err, ERR_INVALID,
                             "read of %u bytes at offset %llu to %p: each must be a multiple of %u",
                             read->bytes, (unsigned long long)read->offset, (void *)read->buffer,
                             FILE_BLOCK_BYTES);
    }
    if (count == 0)
        return 0;
    for (uint32_t i = 0; i < count; i++) {
        reads[i]->error = 0;
        reads[i]->done_bytes = 0;
        reads[i]->retries = 0;
        reads[i]->next = NULL;
    }
    reader->in_flight += count;
    reader->ops->submit(reader, reads, count);
    return 0;
}

uint32_t reader_wait(struct reader *reader, struct reader_read **done, uint32_t done_max,
                     bool block)
{
    uint32_t count = 0;

    if (done_max == 0 || reader->in_flight == 0)
        return 0;
    if (reader->ready.count < reader->in_flight)
        reader->ops->reap(reader, block && reader->ready.count == 0);
    while (count < done_max && reader->ready.count > 0)
        done[count++] = reader_list_pop(&reader->ready);
    reader->in_flight -= count;
    return count;
}

uint32_t reader_in_flight(const struct reader *reader)
{
    return reader->in_flight;
}

uint32_t reader_depth(const struct reader *reader)
{
    return reader->depth;
}

enum reader_backend reader_backend_of(const struct reader *reader)
{
    return reader->backend;
}

const char *reader_backend_name(enum reader_backend backend)
{
    switch (backend) {
    case READER_AUTO:
        return "auto";
    case READER_URING:
        return "uring";
    case READER_PREAD:
        return "pread";
    }
    return "unknown";
}

int reader_backend_parse(const char *text, enum reader_backend *out, struct error *err)
{
    static const enum reader_backend all[] = {READER_AUTO, READER_URING, READER_PREAD};

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (strcmp(text, reader_backend_name(all[i])) == 0) {
            *out = all[i];
            return 0;
        }
    }
    return error_set(err, ERR_INVALID, "'%.64s' is no way of reading: choose auto, uring or pread",
                     text);
}

/* The child's last word; a killed child sends none. */
struct probe_message {
    uint32_t trial; /* enum reader_trial */
    int32_t errno_value;
};

static _Alignas(FILE_BLOCK_BYTES) uint8_t probe_blocks[2][FILE_BLOCK_BYTES];

/* In the child, where only async-signal-safe calls are allowed: the parent may have threads. The
 * program's own file is not stored data, so this is outside vfs. */
static struct probe_message probe_in_child(void)
{
    static const struct rlimit no_core = {0, 0};
    enum reader_trial trial = READER_TRIAL_OPEN;
    ssize_t want;
    int got;
    int fd = open(PROBE_FILE, O_RDONLY | O_CLOEXEC | O_DIRECT);

    if (fd < 0 && errno == EINVAL) /* a file system without O_DIRECT */
        fd = open(PROBE_FILE, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return (struct probe_message){READER_TRIAL_OPEN, errno};
    /* Being killed is one of the expected answers: it should leave no core file, and a handler
     * inherited from the parent should not hide it. */
    setrlimit(RLIMIT_CORE, &no_core);
    prctl(PR_SET_DUMPABLE, 0);
    signal(SIGSYS, SIG_DFL);

    got = reader_uring_try(fd, probe_blocks[0], FILE_BLOCK_BYTES, &trial);
    if (got < 0)
        return (struct probe_message){trial, -got};
    want = pread(fd, probe_blocks[1], FILE_BLOCK_BYTES, 0);
    if (want != got || memcmp(probe_blocks[0], probe_blocks[1], (size_t)got) != 0)
        return (struct probe_message){READER_TRIAL_VERIFY, EIO};
    return (struct probe_message){READER_TRIAL_PASSED, 0};
}

static const char *probe_hint(enum reader_trial trial, int errno_value)
{
    if (trial == READER_TRIAL_OPEN)
        return "";
    switch (errno_value) {
    case EPERM:
    case EACCES:
        return " (often a container's seccomp profile, or kernel.io_uring_disabled)";
    case ENOSYS:
        return " (this kernel has no io_uring, or a seccomp profile says so)";
    case ENOMEM:
        return " (on old kernels the limit on locked memory, ulimit -l)";
    case EMFILE:
    case ENFILE:
        return " (the limit on open files)";
    default:
        return "";
    }
}

static const char *probe_step(enum reader_trial trial)
{
    switch (trial) {
    case READER_TRIAL_OPEN:
        return "open of " PROBE_FILE;
    case READER_TRIAL_SETUP:
        return "io_uring_setup";
    case READER_TRIAL_NOP:
        return "io_uring_enter";
    case READER_TRIAL_READ:
        return "io_uring read of " PROBE_FILE;
    case READER_TRIAL_VERIFY:
        return "io_uring read other bytes of " PROBE_FILE " than pread";
    case READER_TRIAL_PASSED:
        break;
    }
    return "io_uring";
}

/* The message if the child sent one in time. */
static bool probe_receive(int fd, struct probe_message *message, bool *timed_out)
{
    struct pollfd event = {.fd = fd, .events = POLLIN};
    ssize_t got;
    int rc;

    do
        rc = poll(&event, 1, PROBE_TIMEOUT_MS);
    while (rc < 0 && errno == EINTR);
    *timed_out = rc == 0;
    if (rc <= 0)
        return false;
    do
        got = read(fd, message, sizeof *message);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)sizeof *message && message->trial <= READER_TRIAL_PASSED;
}

enum reader_backend reader_probe_now(char reason[256])
{
    struct probe_message message;
    enum reader_backend answer = READER_PREAD;
    int fds[2] = {-1, -1};
    bool received, timed_out;
    int status = 0;
    pid_t child, waited;

    reason[0] = '\0';
    if (pipe2(fds, O_CLOEXEC) < 0) {
        snprintf(reason, 256, "probe of io_uring: pipe: %s", strerrordesc_np(errno));
        return READER_PREAD;
    }
    child = fork();
    if (child < 0) {
        snprintf(reason, 256, "probe of io_uring: fork: %s", strerrordesc_np(errno));
        goto done;
    }
    if (child == 0) {
        message = probe_in_child();
        _exit(write(fds[1], &message, sizeof message) == (ssize_t)sizeof message ? 0 : 1);
    }
    close(fds[1]); /* else the end of a silent child would not show */
    fds[1] = -1;
    received = probe_receive(fds[0], &message, &timed_out);
    if (timed_out)
        kill(child, SIGKILL);
    do
        waited = waitpid(child, &status, 0);
    while (waited < 0 && errno == EINTR);

    if (received && message.trial == READER_TRIAL_PASSED)
        answer = READER_URING;
    else if (received)
        snprintf(reason, 256, "%s: %s%s", probe_step(message.trial),
                 strerrordesc_np(message.errno_value),
                 probe_hint(message.trial, message.errno_value));
    else if (timed_out)
        snprintf(reason, 256, "io_uring gave no answer within %d s", PROBE_TIMEOUT_MS / 1000);
    else if (waited == child && WIFSIGNALED(status))
        snprintf(reason, 256, "io_uring was answered with signal %d, %s%s", WTERMSIG(status),
                 sigdescr_np(WTERMSIG(status)),
                 WTERMSIG(status) == SIGSYS ? " (a seccomp filter that kills)" : "");
    else
        snprintf(reason, 256, "the process that tried io_uring ended without an answer");
done:
    close(fds[0]);
    if (fds[1] >= 0)
        close(fds[1]);
    return answer;
}

static pthread_once_t probe_once = PTHREAD_ONCE_INIT;
static enum reader_backend probe_answer = READER_PREAD;
static char probe_reason[256];

static void probe_first_time(void)
{
    const char *wanted = getenv("ANND_IO");

    if (wanted && strcmp(wanted, "pread") == 0)
        snprintf(probe_reason, sizeof probe_reason, "ANND_IO=pread asks for it");
    else
        probe_answer = reader_probe_now(probe_reason);
}

enum reader_backend reader_probe(char reason[256])
{
    pthread_once(&probe_once, probe_first_time);
    memcpy(reason, probe_reason, sizeof probe_reason);
    return probe_answer;
}
