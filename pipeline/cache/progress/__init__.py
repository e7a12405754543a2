"""How far an unfinished cache is: claims of workers, records of what is done."""
