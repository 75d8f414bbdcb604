"""The data sets that `jobs.download` knows: where they are published, under which licence, and what reads them.

A data set is listed only where its address is certain. A checksum is written down here where it is known for certain;
otherwise the one that the publisher serves beside the file is asked for. Nothing here opens a connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from posixpath import basename
from urllib.parse import urlsplit

from llm4msr.data.source import DataError
from llm4msr.data.tabular import nearest

_AMAZON = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON_CATEGORIES = (
    "AMAZON_FASHION",
    "All_Beauty",
    "Appliances",
    "Arts_Crafts_and_Sewing",
    "Automotive",
    "Books",
    "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Digital_Music",
    "Electronics",
    "Gift_Cards",
    "Grocery_and_Gourmet_Food",
    "Home_and_Kitchen",
    "Industrial_and_Scientific",
    "Kindle_Store",
    "Luxury_Beauty",
    "Magazine_Subscriptions",
    "Movies_and_TV",
    "Musical_Instruments",
    "Office_Products",
    "Patio_Lawn_and_Garden",
    "Pet_Supplies",
    "Prime_Pantry",
    "Software",
    "Sports_and_Outdoors",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Video_Games",
)


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch; archives (.zip, .tar.gz) are unpacked, other files are kept as they are.

    Attributes:
        url: Where the publisher has it.
        md5: Known for certain; lower-case hex.
        sha256: The same.
        checksum_url: Where the publisher serves its MD5, as ``md5sum`` or BSD's ``md5`` writes it.
        zenodo_record: Number of the record whose description lists its size and MD5.
        num_bytes: As the publisher lists it; shown, not checked.
    """

    url: str
    md5: str | None = None
    sha256: str | None = None
    checksum_url: str | None = None
    zenodo_record: int | None = None
    num_bytes: int | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return basename(urlsplit(self.url).path)

    @property
    def is_archive(self) -> bool:
        """Tells whether it is unpacked."""
        return self.name.endswith((".zip", ".tar.gz"))


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: As given on the command line; its files land in a folder of this name.
        files: What to fetch.
        licence: Of the data, in short; read the publisher's own words at `homepage`.
        homepage: Where the publisher describes it.
        raw_folder: What data.raw_uri must name, relative to the folder; empty: the folder itself.
        recipe: The recipe in jobs/recipes that reads it.
        options: Arguments that the recipe needs besides data.raw_uri.
        note: What else to know.
    """

    name: str
    files: tuple[RemoteFile, ...]
    licence: str
    homepage: str
    raw_folder: str = ""
    recipe: str | None = None
    options: tuple[str, ...] = ()
    note: str = ""


def find_data_set(name: str) -> DataSet:
    """Returns the data set of that name.

    Raises:
        DataError: There is none.
    """
    if name not in DATA_SETS:
        hint = nearest(name, list(DATA_SETS))
        raise DataError(f"no data set is named {name!r}; --list shows all {len(DATA_SETS)}.{hint}")
    return DATA_SETS[name]


def _zenodo(record: int, name: str, md5: str | None = None, sha256: str | None = None) -> RemoteFile:
    return RemoteFile(f"https://zenodo.org/records/{record}/files/{name}", md5, sha256, zenodo_record=record)


def _kuaisar(name: str, file: RemoteFile, raw_folder: str, recipe: str) -> DataSet:
    licence, homepage = "CC BY-NC-SA 4.0", "https://kuaisar.github.io"
    return DataSet(name, (file,), licence, homepage, raw_folder, recipe)


def _movielens(name: str, archive: str, num_bytes: int, options: tuple[str, ...] = ()) -> DataSet:
    url = f"{_GROUPLENS}/{archive}.zip"
    file = RemoteFile(url, checksum_url=f"{url}.md5", num_bytes=num_bytes)
    licence, homepage = "GroupLens: research, no redistribution, no commercial use", "https://grouplens.org/datasets"
    return DataSet(name, (file,), licence, homepage, archive, "movielens_100k.toml", options)


def _kuairand(name: str, archive: str) -> DataSet:
    return DataSet(
        name,
        (_zenodo(10439422, f"{archive}.tar.gz"),),
        "CC BY-SA 4.0",
        "https://kuairand.com",
        archive,
        note="no recipe reads it: each of its tabs would be a scenario, and most are too small (docs/data.md)",
    )


def _amazon(name: str, categories: tuple[str, ...], recipe: str | None = None) -> DataSet:
    reviews = (RemoteFile(f"{_AMAZON}/categoryFilesSmall/{category}_5.json.gz") for category in categories)
    metadata = (RemoteFile(f"{_AMAZON}/metaFiles2/meta_{category}.json.gz") for category in categories)
    note = "" if recipe else "read by kind = 'amazon': name its files under data.amazon.categories and metadata"
    licence, homepage = "none stated; the publisher asks to be cited", "https://nijianmo.github.io/amazon"
    return DataSet(name, (*reviews, *metadata), licence, homepage, recipe=recipe, note=note)


DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        _kuaisar(
            "kuaisar-small",
            _zenodo(
                8181109,
                "KuaiSAR.zip",
                md5="daea8cbf605db6bd5841740f0e4a12d9",
                sha256="ed8afa12196cbf18a719511a03b0915522c4039a6c08ce306df69aaeddb9fa1c",
            ),
            "KuaiSAR_final",
            "kuaisar_small.toml",
        ),
        _kuaisar("kuaisar", _zenodo(8181109, "KuaiSAR_v2.zip"), "KuaiSAR_v2", "kuaisar.toml"),
        _movielens("movielens-100k", "ml-100k", 4_924_029),
        _movielens("movielens-1m", "ml-1m", 5_917_549, ("--workspace_uri", "workspace/movielens_1m")),
        _kuairand("kuairand-pure", "KuaiRand-Pure"),
        _kuairand("kuairand-1k", "KuaiRand-1K"),
        _amazon(
            "amazon-2018-5core",
            ("AMAZON_FASHION", "All_Beauty", "Gift_Cards", "Magazine_Subscriptions"),
            "amazon_reviews.toml",
        ),
        *(_amazon(f"amazon-2018-{name.lower().replace('_', '-')}", (name,)) for name in _AMAZON_CATEGORIES),
    )
}
