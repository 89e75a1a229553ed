/* vfs_posix: each call is one system call, or as few as it takes to keep the contract.
 *
 * Interrupted and short reads and writes are passed on (file.c owns those loops); allocate has no
 * loop above it and tries again by itself. Only regular files are opened: a FIFO or device put in
 * the place of a data file must be an error, not a hang. */
#include "storage/vfs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define FILE_MODE 0640
#define FOLDER_MODE 0750

/* 0 or the negative errno of a call that returns -1 on failure. */
static int result(long returned)
{
    return returned < 0 ? -errno : 0;
}

/* Checks that fd is a regular file and settles its status flags. O_NONBLOCK was only there for the
 * open to return; left on, it would turn io_uring's reads into EAGAIN. O_DIRECT is set here and
 * not at the open, because a file system that refuses it there has created the file by then. */
static int settle(int fd, bool direct)
{
    struct stat st;
    int flags;

    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    flags &= ~O_NONBLOCK;
    if (direct) {
        if (fcntl(fd, F_SETFL, flags | O_DIRECT) == 0)
            return 0;
        if (errno != EINVAL)
            return -errno;
    }
    return result(fcntl(fd, F_SETFL, flags));
}

static int posix_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct vfs_file *file;
    int how = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    int rc;

    how |= flags & VFS_WRITE ? O_RDWR : O_RDONLY;
    if (flags & VFS_CREATE)
        how |= O_CREAT | O_EXCL;
    if (flags & VFS_OPEN_OR_CREATE)
        how |= O_CREAT;
    file = malloc(sizeof *file);
    if (!file)
        return -ENOMEM;
    file->vfs = vfs;
    file->fd = open(path, how, FILE_MODE);
    if (file->fd < 0) {
        rc = -errno;
        free(file);
        return rc;
    }
    rc = settle(file->fd, flags & VFS_DIRECT);
    if (rc < 0) {
        close(file->fd);
        free(file);
        return rc;
    }
    *out = file;
    return 0;
}

static int posix_close(struct vfs_file *file)
{
    int rc = result(close(file->fd));

    free(file);
    /* Linux has closed the descriptor even when the call was interrupted. */
    return rc == -EINTR ? 0 : rc;
}

static int posix_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                       size_t *got)
{
    ssize_t n = pread(file->fd, buffer, bytes, (off_t)offset);

    if (n < 0)
        return -errno;
    *got = (size_t)n;
    return 0;
}

static int posix_pwrite(struct vfs_file *file, const void *buffer, size_t bytes, uint64_t offset,
                        size_t *put)
{
    ssize_t n = pwrite(file->fd, buffer, bytes, (off_t)offset);

    if (n < 0)
        return -errno;
    *put = (size_t)n;
    return 0;
}

static int posix_sync(struct vfs_file *file, bool data_only)
{
    return result(data_only ? fdatasync(file->fd) : fsync(file->fd));
}

static int posix_allocate(struct vfs_file *file, uint64_t offset, uint64_t bytes)
{
    int rc;

    if (bytes == 0)
        return 0;
    do {
        rc = result(fallocate(file->fd, 0, (off_t)offset, (off_t)bytes));
    } while (rc == -EINTR);
    /* Preallocation is a favour: without it the writes find out about a full disk themselves. */
    return rc == -EOPNOTSUPP ? 0 : rc;
}

static int posix_truncate(struct vfs_file *file, uint64_t bytes)
{
    int rc;

    do {
        rc = result(ftruncate(file->fd, (off_t)bytes));
    } while (rc == -EINTR);
    return rc;
}

static int posix_size(struct vfs_file *file, uint64_t *bytes)
{
    struct stat st;

    if (fstat(file->fd, &st) < 0)
        return -errno;
    *bytes = (uint64_t)st.st_size;
    return 0;
}

static int posix_lock(struct vfs_file *file)
{
    return result(flock(file->fd, LOCK_EX | LOCK_NB));
}

static enum vfs_kind kind_of_mode(mode_t mode)
{
    return S_ISREG(mode) ? VFS_FILE : S_ISDIR(mode) ? VFS_DIRECTORY : VFS_OTHER;
}

static int posix_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    struct stat st;

    (void)vfs;
    if (stat(path, &st) < 0)
        return -errno;
    out->kind = kind_of_mode(st.st_mode);
    out->bytes = (uint64_t)st.st_size;
    out->device = (uint64_t)st.st_dev;
    return 0;
}

static int posix_rename(struct vfs *vfs, const char *from, const char *to)
{
    (void)vfs;
    return result(rename(from, to));
}

static int posix_link(struct vfs *vfs, const char *from, const char *to)
{
    (void)vfs;
    return result(link(from, to));
}

static int posix_unlink(struct vfs *vfs, const char *path)
{
    (void)vfs;
    return result(unlink(path));
}

static int posix_mkdir(struct vfs *vfs, const char *path)
{
    (void)vfs;
    return result(mkdir(path, FOLDER_MODE));
}

static int posix_rmdir(struct vfs *vfs, const char *path)
{
    (void)vfs;
    return result(rmdir(path));
}

/* A symbolic link is VFS_OTHER, whatever it points to: a listing must not lead out of the folder.
 */
static int kind_of_entry(DIR *folder, const struct dirent *entry, enum vfs_kind *out)
{
    struct stat st;

    switch (entry->d_type) {
    case DT_REG:
        *out = VFS_FILE;
        return 0;
    case DT_DIR:
        *out = VFS_DIRECTORY;
        return 0;
    case DT_UNKNOWN:
        if (fstatat(dirfd(folder), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            return -errno;
        *out = kind_of_mode(st.st_mode);
        return 0;
    default:
        *out = VFS_OTHER;
        return 0;
    }
}

static int posix_list(struct vfs *vfs, const char *path, vfs_list_fn each, void *context)
{
    DIR *folder = opendir(path);
    int rc = 0;

    (void)vfs;
    if (!folder)
        return -errno;
    for (;;) {
        struct dirent *entry;
        enum vfs_kind kind;

        errno = 0;
        entry = readdir(folder);
        if (!entry) {
            rc = -errno;
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        rc = kind_of_entry(folder, entry, &kind);
        if (rc == -ENOENT)
            continue; /* removed since it was read */
        if (rc < 0)
            break;
        each(context, entry->d_name, kind);
    }
    closedir(folder);
    return rc;
}

static int posix_dirsync(struct vfs *vfs, const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc;

    (void)vfs;
    if (fd < 0)
        return -errno;
    rc = result(fsync(fd));
    close(fd);
    /* The file system has no such thing as syncing a folder. */
    return rc == -EINVAL ? 0 : rc;
}

static int posix_space(struct vfs *vfs, const char *path, uint64_t *free_bytes)
{
    struct statvfs st;

    (void)vfs;
    if (statvfs(path, &st) < 0)
        return -errno;
    *free_bytes = (uint64_t)st.f_bavail * st.f_frsize;
    return 0;
}

struct vfs *vfs_posix(void)
{
    /* Never written to; not const because implementations with state share the type. */
    static struct vfs posix = {
        .open = posix_open,
        .close = posix_close,
        .pread = posix_pread,
        .pwrite = posix_pwrite,
        .sync = posix_sync,
        .allocate = posix_allocate,
        .truncate = posix_truncate,
        .size = posix_size,
        .lock = posix_lock,
        .stat = posix_stat,
        .rename = posix_rename,
        .link = posix_link,
        .unlink = posix_unlink,
        .mkdir = posix_mkdir,
        .rmdir = posix_rmdir,
        .list = posix_list,
        .dirsync = posix_dirsync,
        .space = posix_space,
        .read_result = NULL,
    };

    return &posix;
}
