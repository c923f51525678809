"""For MkDocs: pages link to files outside of docs/, and the links lead there on the site as they do in the repository.

Each file that a page links to becomes part of the site, below ``repository/``; a Markdown file becomes a page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

REPOSITORY = Path(__file__).resolve().parents[1]
#: The target of a link to a file of the repository, and a whole link without an anchor.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
TO_FOLDER = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)\)")


def on_files(files, config):
    """Add the files that pages link to, and those that these link to."""
    pages = [file.src_uri for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        text = (REPOSITORY / repository_path(page)).read_text(encoding="utf-8")
        for link in LINK.findall(text):
            uri = site_path(target_of(page, link))
            source = REPOSITORY / repository_path(uri)
            if files.get_file_from_path(uri) is None and source.is_file():  # MkDocs itself reports what is not there
                is_page = source.suffix == ".md"
                level = InclusionLevel.NOT_IN_NAV if is_page else InclusionLevel.INCLUDED
                files.append(File.generated(config, uri, abs_src_path=str(source), inclusion=level))
                pages += [uri] * is_page
    return files


def on_page_markdown(markdown, page, **_):
    """Let the links of a page lead to where their targets are on the site; a folder is none, and its link is text."""
    here = page.file.src_uri

    def to_text(match: re.Match) -> str:
        return match[1] if (REPOSITORY / target_of(here, match[2])).is_dir() else match[0]

    def to_site(match: re.Match) -> str:
        return posixpath.relpath(site_path(target_of(here, match[1])), posixpath.dirname(here) or ".")

    return LINK.sub(to_site, TO_FOLDER.sub(to_text, markdown))


def target_of(page: str, link: str) -> str:
    """Path in the repository that a link of a page of the site stands for."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), link))


def repository_path(uri: str) -> str:
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def site_path(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
