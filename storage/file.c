/* Loops over short and interrupted calls live here and nowhere else. A transfer whose offset,
 * length and buffer are block-aligned may be on an O_DIRECT file: after a short call it goes on
 * from the last whole block, for O_DIRECT takes no other offset, and moves some bytes twice.
 * Interruptions are tried again, but not for ever: a file system that only ever answers EINTR is
 * broken, and a hang would hide it. A failed sync is never repeated: after it the kernel may have
 * dropped the dirty pages, and a second sync would lie. */
#include "storage/file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRIES_MAX 100u /* without progress */
#define BLOCK_MASK ((uint64_t)FILE_BLOCK_BYTES - 1)

static bool is_aligned(const void *buffer, size_t bytes, uint64_t offset)
{
    return (((uintptr_t)buffer | bytes | offset) & BLOCK_MASK) == 0;
}

struct vfs_file *file_open(struct vfs *vfs, const char *path, unsigned flags, struct error *err)
{
    struct vfs_file *file = NULL;
    const char *what = flags & VFS_CREATE  ? "create"
                       : flags & VFS_WRITE ? "open for writing"
                                           : "open for reading";
    unsigned tries = 0;
    int rc;

    do {
        rc = vfs->open(vfs, path, flags, &file);
    } while (rc == -EINTR && ++tries < TRIES_MAX);
    if (rc < 0) {
        error_set_errno(err, rc, "%s: cannot %s", path, what);
        return NULL;
    }
    return file;
}

int file_close(struct vfs_file *file, const char *path, struct error *err)
{
    int rc;

    if (!file)
        return 0;
    rc = file->vfs->close(file);
    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot close", path);
    return 0;
}

int file_size(struct vfs_file *file, const char *path, uint64_t *bytes, struct error *err)
{
    int rc = file->vfs->size(file, bytes);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot get the size", path);
    return 0;
}

static int ends_early(const char *path, uint64_t end, size_t bytes, uint64_t offset,
                      struct error *err)
{
    return error_set(err, ERR_CORRUPT, "%s: ends at byte %llu, wanted %zu bytes at offset %llu",
                     path, (unsigned long long)end, bytes, (unsigned long long)offset);
}

int file_read_exact(struct vfs_file *file, const char *path, void *buffer, size_t bytes,
                    uint64_t offset, struct error *err)
{
    bool aligned = is_aligned(buffer, bytes, offset);
    unsigned tries = 0;
    size_t done = 0;

    while (done < bytes) {
        uint64_t file_bytes;
        size_t got = 0;
        size_t next;
        int rc =
            file->vfs->pread(file, (uint8_t *)buffer + done, bytes - done, offset + done, &got);

        if (rc == -EINTR && ++tries < TRIES_MAX)
            continue;
        if (rc < 0)
            return error_set_errno(err, rc, "%s: cannot read %zu bytes at offset %llu", path, bytes,
                                   (unsigned long long)offset);
        if (got == bytes - done)
            return 0;
        if (got == 0)
            return ends_early(path, offset + done, bytes, offset, err);
        next = done + got;
        if (aligned) {
            /* Going on from the last whole block could meet the same short end again. */
            if (file_size(file, path, &file_bytes, err) < 0)
                return -1;
            if (offset + next >= file_bytes)
                return ends_early(path, file_bytes, bytes, offset, err);
            next &= ~(size_t)BLOCK_MASK;
        }
        if (next > done)
            tries = 0;
        else if (++tries >= TRIES_MAX)
            return error_set(err, ERR_IO, "%s: reads at offset %llu stay short: %zu of %zu bytes",
                             path, (unsigned long long)(offset + done), got, bytes - done);
        done = next;
    }
    return 0;
}

int file_write_full(struct vfs_file *file, const char *path, const void *buffer, size_t bytes,
                    uint64_t offset, struct error *err)
{
    bool aligned = is_aligned(buffer, bytes, offset);
    unsigned tries = 0;
    size_t done = 0;

    while (done < bytes) {
        size_t put = 0;
        size_t next;
        int rc = file->vfs->pwrite(file, (const uint8_t *)buffer + done, bytes - done,
                                   offset + done, &put);

        if (rc == -EINTR && ++tries < TRIES_MAX)
            continue;
        if (rc < 0)
            return error_set_errno(err, rc, "%s: cannot write %zu bytes at offset %llu", path,
                                   bytes, (unsigned long long)offset);
        if (put == bytes - done)
            return 0;
        next = done + put;
        if (aligned)
            next &= ~(size_t)BLOCK_MASK;
        if (next > done)
            tries = 0;
        else if (put == 0 || ++tries >= TRIES_MAX)
            return error_set(err, ERR_IO, "%s: writes at offset %llu stay short: %zu of %zu bytes",
                             path, (unsigned long long)(offset + done), put, bytes - done);
        done = next;
    }
    return 0;
}

int file_sync(struct vfs_file *file, const char *path, struct error *err)
{
    int rc = file->vfs->sync(file, false);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot sync", path);
    return 0;
}

int file_read_whole(struct vfs *vfs, const char *path, size_t bytes_max, uint8_t **out,
                    size_t *bytes, struct error *err)
{
    struct vfs_file *file = NULL;
    uint8_t *data = NULL;
    uint64_t file_bytes;
    int rc = -1;

    file = file_open(vfs, path, VFS_READ, err);
    if (!file || file_size(file, path, &file_bytes, err) < 0)
        goto done;
    if (file_bytes > bytes_max || file_bytes == SIZE_MAX) {
        error_set(err, ERR_INVALID, "%s: has %llu bytes, at most %zu are allowed", path,
                  (unsigned long long)file_bytes, bytes_max);
        goto done;
    }
    data = malloc((size_t)file_bytes + 1);
    if (!data) {
        error_set(err, ERR_NOMEM, "%s: no memory for its %llu bytes", path,
                  (unsigned long long)file_bytes);
        goto done;
    }
    if (file_read_exact(file, path, data, (size_t)file_bytes, 0, err) < 0)
        goto done;
    data[file_bytes] = 0;
    *out = data;
    *bytes = (size_t)file_bytes;
    data = NULL;
    rc = 0;
done:
    free(data);
    /* Nothing was written: a failing close takes nothing away from what was read. */
    file_close(file, path, NULL);
    return rc;
}

int file_publish(struct vfs *vfs, const char *path, const void *data, size_t bytes,
                 struct error *err)
{
    char aside[FILE_PATH_MAX], folder[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    bool created = false;
    int rc = -1;
    int called;

    called = snprintf(aside, sizeof aside, "%s.tmp", path);
    if (called < 0 || (size_t)called >= sizeof aside)
        return error_set(err, ERR_INVALID, "the path is longer than %u bytes: %.100s...",
                         FILE_PATH_MAX - 1, path);
    file_path_folder(folder, path);
    called = vfs->unlink(vfs, aside);
    if (called < 0 && called != -ENOENT) {
        error_set_errno(err, called, "%s: cannot remove the leftover", aside);
        goto done;
    }
    file = file_open(vfs, aside, VFS_WRITE | VFS_CREATE, err);
    if (!file)
        goto done;
    created = true;
    if (file_write_full(file, aside, data, bytes, 0, err) < 0 || file_sync(file, aside, err) < 0)
        goto done;
    called = file_close(file, aside, err);
    file = NULL;
    if (called < 0 || file_rename(vfs, aside, path, err) < 0)
        goto done;
    created = false;
    rc = file_dirsync(vfs, folder, err);
done:
    file_close(file, aside, NULL);
    if (created)
        vfs->unlink(vfs, aside); /* a leftover does no harm */
    return rc;
}

int file_stat(struct vfs *vfs, const char *path, struct vfs_stat *out, struct error *err)
{
    int rc = vfs->stat(vfs, path, out);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot stat", path);
    return 0;
}

bool file_exists(struct vfs *vfs, const char *path)
{
    struct vfs_stat st;

    return vfs->stat(vfs, path, &st) == 0;
}

int file_mkdir(struct vfs *vfs, const char *path, struct error *err)
{
    int rc = vfs->mkdir(vfs, path);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot create the folder", path);
    return 0;
}

int file_rename(struct vfs *vfs, const char *from, const char *to, struct error *err)
{
    int rc = vfs->rename(vfs, from, to);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot rename to %s", from, to);
    return 0;
}

int file_dirsync(struct vfs *vfs, const char *path, struct error *err)
{
    int rc = vfs->dirsync(vfs, path);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot sync the folder", path);
    return 0;
}

/* path is a buffer of FILE_PATH_MAX with `length` bytes in use: one for the whole walk, so that a
 * deep tree costs little stack. Unlinking is tried before anything else: it alone decides without
 * a race whether this is a folder, and it removes a symbolic link instead of following it. */
static int remove_walk(struct vfs *vfs, char *path, size_t length, struct error *err)
{
    char **names = NULL;
    uint32_t count = 0;
    int rc = vfs->unlink(vfs, path);

    if (rc == 0 || rc == -ENOENT)
        return 0;
    /* Linux's answer for a folder. POSIX's EPERM can also mean a symbolic link that may not be
     * removed, and its target is not ours to empty. */
    if (rc != -EISDIR)
        return error_set_errno(err, rc, "%s: cannot remove", path);
    if (file_list(vfs, path, &names, &count, err) < 0)
        return -1;
    rc = 0;
    for (uint32_t i = 0; i < count && rc == 0; i++) {
        size_t name_length = strlen(names[i]);

        if (length + 1 + name_length >= FILE_PATH_MAX) {
            rc = error_set(err, ERR_INVALID, "%s: the path of an entry is longer than %u bytes",
                           path, FILE_PATH_MAX - 1);
            break;
        }
        path[length] = '/';
        memcpy(path + length + 1, names[i], name_length + 1);
        rc = remove_walk(vfs, path, length + 1 + name_length, err);
        path[length] = '\0';
    }
    file_names_free(names, count);
    if (rc < 0)
        return -1;
    rc = vfs->rmdir(vfs, path);
    if (rc < 0 && rc != -ENOENT)
        return error_set_errno(err, rc, "%s: cannot remove the folder", path);
    return 0;
}

int file_remove_all(struct vfs *vfs, const char *path, struct error *err)
{
    char walk[FILE_PATH_MAX];
    size_t length = strlen(path);

    if (length >= sizeof walk)
        return error_set(err, ERR_INVALID, "the path is longer than %u bytes: %.100s...",
                         FILE_PATH_MAX - 1, path);
    memcpy(walk, path, length + 1);
    return remove_walk(vfs, walk, length, err);
}

struct name_list {
    char **names;
    uint32_t count;
    uint32_t room;
    bool failed; /* memory is out */
};

static void collect_name(void *context, const char *name, enum vfs_kind kind)
{
    struct name_list *list = context;
    char *copy;

    (void)kind;
    if (list->failed)
        return;
    if (list->count == list->room) {
        uint32_t room = list->room == 0 ? 16 : list->room * 2;
        char **names = room > list->room ? realloc(list->names, room * sizeof *names) : NULL;

        if (!names) {
            list->failed = true;
            return;
        }
        list->names = names;
        list->room = room;
    }
    copy = strdup(name);
    if (!copy) {
        list->failed = true;
        return;
    }
    list->names[list->count++] = copy;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int file_list(struct vfs *vfs, const char *path, char ***names, uint32_t *count, struct error *err)
{
    struct name_list list = {0};
    int rc = vfs->list(vfs, path, collect_name, &list);

    if (rc < 0)
        error_set_errno(err, rc, "%s: cannot list the folder", path);
    else if (list.failed)
        rc = error_set(err, ERR_NOMEM, "%s: no memory for its entries", path);
    if (rc < 0) {
        file_names_free(list.names, list.count);
        return -1;
    }
    if (list.count > 0)
        qsort(list.names, list.count, sizeof *list.names, compare_names);
    *names = list.names;
    *count = list.count;
    return 0;
}

void file_names_free(char **names, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        free(names[i]);
    free(names);
}

int file_path_join(char *out, const char *folder, const char *name, struct error *err)
{
    size_t length = strlen(folder);
    const char *between = length == 0 || folder[length - 1] == '/' ? "" : "/";
    int wanted = snprintf(out, FILE_PATH_MAX, "%s%s%s", folder, between, name);

    if (wanted < 0 || wanted >= (int)FILE_PATH_MAX)
        return error_set(err, ERR_INVALID, "the path is longer than %u bytes: %.100s.../%.100s",
                         FILE_PATH_MAX - 1, folder, name);
    return 0;
}

void file_path_folder(char *out, const char *path)
{
    size_t length = strlen(path);

    /* Slashes at the end, the last name, the slashes before it. */
    while (length > 1 && path[length - 1] == '/')
        length--;
    while (length > 0 && path[length - 1] != '/')
        length--;
    while (length > 1 && path[length - 1] == '/')
        length--;
    if (length == 0) {
        memcpy(out, ".", 2);
        return;
    }
    /* No such path exists; the empty one does not either, and is not somebody else's folder. */
    if (length >= FILE_PATH_MAX)
        length = 0;
    memcpy(out, path, length);
    out[length] = '\0';
}

void *file_buffer_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX - FILE_BLOCK_BYTES)
        return NULL;
    if (bytes == 0)
        bytes = 1;
    /* aligned_alloc wants a multiple of the alignment; the rest of the last block is a gift. */
    return aligned_alloc(FILE_BLOCK_BYTES, (bytes + BLOCK_MASK) & ~(size_t)BLOCK_MASK);
}
