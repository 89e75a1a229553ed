/* Each call asks strike() whether the plan's hour has come and gets a copy of the plan when it has;
 * what the effect means is decided per call. The caller's buffers are never written to on the way
 * out: a flipped write goes through a copy. */
#include "tests/support/vfs_fault.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct fault_file {
    struct vfs_file base;
    struct vfs_file *inner;
    char path[];
};

static struct vfs_fault *fault_of(struct vfs *vfs)
{
    return (struct vfs_fault *)vfs; /* its first member */
}

static struct fault_file *file_of(struct vfs_file *file)
{
    return (struct fault_file *)file;
}

static bool path_matches(const char *part, const char *path, const char *other)
{
    return !part || (path && strstr(path, part)) || (other && strstr(other, part));
}

/* Counts the call. True when it is to go wrong, and then *plan says how. */
static bool strike(struct vfs *vfs, enum vfs_call call, const char *path, const char *other,
                   struct vfs_fault_plan *plan)
{
    struct vfs_fault *fault = fault_of(vfs);
    bool struck = false;

    pthread_mutex_lock(&fault->mutex);
    fault->calls[VFS_CALL_ANY]++;
    fault->calls[call]++;
    if ((fault->plan.call == VFS_CALL_ANY || fault->plan.call == call) &&
        path_matches(fault->plan.path, path, other)) {
        fault->matched++;
        struck = fault->plan.nth != 0 && (fault->plan.for_ever ? fault->matched >= fault->plan.nth
                                                               : fault->matched == fault->plan.nth);
        if (struck) {
            fault->fired++;
            *plan = fault->plan;
        }
    }
    pthread_mutex_unlock(&fault->mutex);
    return struck;
}

/* For calls that either happen or do not: true when the inner call is to be left out and *rc is
 * the answer. */
static bool replaced(struct vfs *vfs, enum vfs_call call, const char *path, const char *other,
                     bool forgettable, int *rc)
{
    struct vfs_fault_plan plan;

    if (!strike(vfs, call, path, other, &plan))
        return false;
    if (plan.effect == VFS_EFFECT_ERRNO || plan.effect == VFS_EFFECT_TEAR_ERRNO) {
        *rc = -plan.errno_value;
        return true;
    }
    *rc = 0;
    return plan.effect == VFS_EFFECT_FORGET && forgettable;
}

static size_t part_of(const struct vfs_fault_plan *plan, size_t bytes)
{
    size_t part = plan->bytes != 0 ? (size_t)plan->bytes : bytes / 2;

    return part < bytes ? part : bytes;
}

static void flip(void *buffer, size_t bytes, uint64_t bit)
{
    if (bytes > 0)
        ((uint8_t *)buffer)[bit / 8 % bytes] ^= (uint8_t)(1u << (bit % 8));
}

static int fault_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct vfs_fault *fault = fault_of(vfs);
    size_t path_bytes = strlen(path) + 1;
    struct fault_file *file;
    int rc;

    if (replaced(vfs, VFS_CALL_OPEN, path, NULL, false, &rc))
        return rc;
    file = malloc(sizeof *file + path_bytes);
    if (!file)
        return -ENOMEM;
    rc = fault->inner->open(fault->inner, path, flags, &file->inner);
    if (rc < 0) {
        free(file);
        return rc;
    }
    file->base.vfs = vfs;
    file->base.fd = file->inner->fd;
    memcpy(file->path, path, path_bytes);
    pthread_mutex_lock(&fault->mutex);
    fault->files_open++;
    pthread_mutex_unlock(&fault->mutex);
    *out = &file->base;
    return 0;
}

static int fault_close(struct vfs_file *base)
{
    struct fault_file *file = file_of(base);
    struct vfs_fault *fault = fault_of(base->vfs);
    int replaced_rc;
    bool is_replaced = replaced(base->vfs, VFS_CALL_CLOSE, file->path, NULL, false, &replaced_rc);
    int rc = file->inner->vfs->close(file->inner);

    pthread_mutex_lock(&fault->mutex);
    fault->files_open--;
    pthread_mutex_unlock(&fault->mutex);
    free(file);
    return is_replaced ? replaced_rc : rc;
}

/* What a read of `result` bytes (or negative errno) is turned into. */
static int spoil_read(const struct vfs_fault_plan *plan, void *buffer, size_t bytes, int64_t result,
                      int64_t *spoilt)
{
    *spoilt = result;
    if (plan->effect == VFS_EFFECT_ERRNO || plan->effect == VFS_EFFECT_TEAR_ERRNO)
        return -plan->errno_value;
    if (result < 0)
        return (int)result;
    if (plan->effect == VFS_EFFECT_SHORT) {
        size_t part = part_of(plan, bytes);

        *spoilt = (size_t)result < part ? result : (int64_t)part;
    } else if (plan->effect == VFS_EFFECT_TEAR) {
        size_t part = part_of(plan, (size_t)result);

        memset((uint8_t *)buffer + part, 0xA5, (size_t)result - part);
    } else if (plan->effect == VFS_EFFECT_FLIP) {
        flip(buffer, (size_t)result, plan->bit);
    }
    return 0;
}

static int fault_pread(struct vfs_file *base, void *buffer, size_t bytes, uint64_t offset,
                       size_t *got)
{
    struct fault_file *file = file_of(base);
    struct vfs_fault_plan plan;
    int64_t spoilt;
    int rc;

    if (!strike(base->vfs, VFS_CALL_READ, file->path, NULL, &plan))
        return file->inner->vfs->pread(file->inner, buffer, bytes, offset, got);
    if (plan.effect == VFS_EFFECT_ERRNO || plan.effect == VFS_EFFECT_TEAR_ERRNO)
        return -plan.errno_value;
    rc = file->inner->vfs->pread(file->inner, buffer, bytes, offset, got);
    if (rc < 0)
        return rc;
    rc = spoil_read(&plan, buffer, bytes, (int64_t)*got, &spoilt);
    *got = (size_t)spoilt;
    return rc;
}

static int fault_read_result(struct vfs_file *base, void *buffer, size_t bytes, uint64_t offset,
                             int result)
{
    struct fault_file *file = file_of(base);
    struct vfs_fault_plan plan;
    int64_t spoilt;
    int rc;

    if (file->inner->vfs->read_result)
        result = file->inner->vfs->read_result(file->inner, buffer, bytes, offset, result);
    if (!strike(base->vfs, VFS_CALL_READ, file->path, NULL, &plan))
        return result;
    rc = spoil_read(&plan, buffer, bytes, result, &spoilt);
    return rc < 0 ? rc : (int)spoilt;
}

static int fault_pwrite(struct vfs_file *base, const void *buffer, size_t bytes, uint64_t offset,
                        size_t *put)
{
    struct fault_file *file = file_of(base);
    struct vfs *inner = file->inner->vfs;
    struct vfs_fault_plan plan;
    void *copy;
    int rc = 0;

    if (!strike(base->vfs, VFS_CALL_WRITE, file->path, NULL, &plan))
        return inner->pwrite(file->inner, buffer, bytes, offset, put);
    switch (plan.effect) {
    case VFS_EFFECT_ERRNO:
        return -plan.errno_value;
    case VFS_EFFECT_SHORT:
        *put = 0;
        bytes = part_of(&plan, bytes);
        return bytes > 0 ? inner->pwrite(file->inner, buffer, bytes, offset, put) : 0;
    case VFS_EFFECT_TEAR:
    case VFS_EFFECT_TEAR_ERRNO:
        if (part_of(&plan, bytes) > 0) {
            rc = inner->pwrite(file->inner, buffer, part_of(&plan, bytes), offset, put);
            /* O_DIRECT refuses a part that is not whole blocks: tear at the block before. */
            if (rc == -EINVAL && part_of(&plan, bytes) >= 512)
                rc = inner->pwrite(file->inner, buffer, part_of(&plan, bytes) & ~(size_t)511,
                                   offset, put);
            else if (rc == -EINVAL)
                rc = 0;
        }
        if (plan.effect == VFS_EFFECT_TEAR_ERRNO)
            return -plan.errno_value;
        *put = bytes;
        return rc;
    case VFS_EFFECT_FLIP:
        copy = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
        if (!copy)
            return -ENOMEM;
        memcpy(copy, buffer, bytes);
        flip(copy, bytes, plan.bit);
        rc = inner->pwrite(file->inner, copy, bytes, offset, put);
        free(copy);
        return rc;
    case VFS_EFFECT_FORGET:
        *put = bytes;
        return 0;
    }
    return -EINVAL;
}

static int fault_sync(struct vfs_file *base, bool data_only)
{
    struct fault_file *file = file_of(base);
    int rc;

    if (replaced(base->vfs, VFS_CALL_SYNC, file->path, NULL, true, &rc))
        return rc;
    return file->inner->vfs->sync(file->inner, data_only);
}

static int fault_allocate(struct vfs_file *base, uint64_t offset, uint64_t bytes)
{
    struct fault_file *file = file_of(base);
    int rc;

    if (replaced(base->vfs, VFS_CALL_ALLOCATE, file->path, NULL, true, &rc))
        return rc;
    return file->inner->vfs->allocate(file->inner, offset, bytes);
}

static int fault_truncate(struct vfs_file *base, uint64_t bytes)
{
    struct fault_file *file = file_of(base);
    int rc;

    if (replaced(base->vfs, VFS_CALL_TRUNCATE, file->path, NULL, true, &rc))
        return rc;
    return file->inner->vfs->truncate(file->inner, bytes);
}

static int fault_size(struct vfs_file *base, uint64_t *bytes)
{
    struct fault_file *file = file_of(base);
    int rc;

    if (replaced(base->vfs, VFS_CALL_SIZE, file->path, NULL, false, &rc))
        return rc;
    return file->inner->vfs->size(file->inner, bytes);
}

static int fault_lock(struct vfs_file *base)
{
    struct fault_file *file = file_of(base);
    int rc;

    if (replaced(base->vfs, VFS_CALL_LOCK, file->path, NULL, false, &rc))
        return rc;
    return file->inner->vfs->lock(file->inner);
}

static int fault_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_STAT, path, NULL, false, &rc))
        return rc;
    return inner->stat(inner, path, out);
}

static int fault_rename(struct vfs *vfs, const char *from, const char *to)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_RENAME, from, to, true, &rc))
        return rc;
    return inner->rename(inner, from, to);
}

static int fault_link(struct vfs *vfs, const char *from, const char *to)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_LINK, from, to, true, &rc))
        return rc;
    return inner->link(inner, from, to);
}

static int fault_unlink(struct vfs *vfs, const char *path)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_UNLINK, path, NULL, true, &rc))
        return rc;
    return inner->unlink(inner, path);
}

static int fault_mkdir(struct vfs *vfs, const char *path)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_MKDIR, path, NULL, true, &rc))
        return rc;
    return inner->mkdir(inner, path);
}

static int fault_rmdir(struct vfs *vfs, const char *path)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_RMDIR, path, NULL, true, &rc))
        return rc;
    return inner->rmdir(inner, path);
}

static int fault_list(struct vfs *vfs, const char *path, vfs_list_fn each, void *context)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_LIST, path, NULL, false, &rc))
        return rc;
    return inner->list(inner, path, each, context);
}

static int fault_dirsync(struct vfs *vfs, const char *path)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_DIRSYNC, path, NULL, true, &rc))
        return rc;
    return inner->dirsync(inner, path);
}

static int fault_space(struct vfs *vfs, const char *path, uint64_t *free_bytes)
{
    struct vfs *inner = fault_of(vfs)->inner;
    int rc;

    if (replaced(vfs, VFS_CALL_SPACE, path, NULL, false, &rc))
        return rc;
    return inner->space(inner, path, free_bytes);
}

void vfs_fault_init(struct vfs_fault *fault, struct vfs *inner)
{
    memset(fault, 0, sizeof *fault);
    pthread_mutex_init(&fault->mutex, NULL);
    fault->inner = inner;
    fault->vfs = (struct vfs){
        .open = fault_open,
        .close = fault_close,
        .pread = fault_pread,
        .pwrite = fault_pwrite,
        .sync = fault_sync,
        .allocate = fault_allocate,
        .truncate = fault_truncate,
        .size = fault_size,
        .lock = fault_lock,
        .stat = fault_stat,
        .rename = fault_rename,
        .link = fault_link,
        .unlink = fault_unlink,
        .mkdir = fault_mkdir,
        .rmdir = fault_rmdir,
        .list = fault_list,
        .dirsync = fault_dirsync,
        .space = fault_space,
        .read_result = fault_read_result,
    };
}

void vfs_fault_release(struct vfs_fault *fault)
{
    pthread_mutex_destroy(&fault->mutex);
}

void vfs_fault_plan(struct vfs_fault *fault, const struct vfs_fault_plan *plan)
{
    pthread_mutex_lock(&fault->mutex);
    fault->plan = plan ? *plan : (struct vfs_fault_plan){0};
    fault->matched = 0;
    fault->fired = 0;
    memset(fault->calls, 0, sizeof fault->calls);
    pthread_mutex_unlock(&fault->mutex);
}

uint64_t vfs_fault_calls(struct vfs_fault *fault, enum vfs_call call)
{
    uint64_t calls;

    pthread_mutex_lock(&fault->mutex);
    calls = fault->calls[call];
    pthread_mutex_unlock(&fault->mutex);
    return calls;
}

uint64_t vfs_fault_fired(struct vfs_fault *fault)
{
    uint64_t fired;

    pthread_mutex_lock(&fault->mutex);
    fired = fault->fired;
    pthread_mutex_unlock(&fault->mutex);
    return fired;
}

int64_t vfs_fault_files_open(struct vfs_fault *fault)
{
    int64_t files_open;

    pthread_mutex_lock(&fault->mutex);
    files_open = fault->files_open;
    pthread_mutex_unlock(&fault->mutex);
    return files_open;
}
